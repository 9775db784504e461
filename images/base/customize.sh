#!/bin/sh
# Runs as root inside the new tree, without network, after the packages of recipe.toml are in; its folder is at /.recipe.
set -eu

# pip may install: this is one agent's own computer, not a distribution to protect. The diversion keeps the marker
# away when a Debian update brings it back; /etc/pip.conf says the same to a pip that somebody installs beside Debian's.
for marker in /usr/lib/python3.*/EXTERNALLY-MANAGED; do
    [ -e "$marker" ] || continue
    dpkg-divert --quiet --local --rename --divert "$marker.debian" --add "$marker"
done

useradd --uid 1000 --user-group --create-home --shell /bin/bash user
# .profile puts ~/.local/bin on PATH only where it exists, and the login environment is captured before the first
# `pip install` could have made it.
install -d -o user -g user -m 0755 /home/user /home/user/.cache /home/user/.local /home/user/.local/bin

# gVisor ignores set-uid bits, so the guest agent is the guest's sudo. The diversion keeps Debian's sudo, should
# somebody install it, from taking the name.
dpkg-divert --quiet --local --rename --divert /usr/bin/sudo.debian --add /usr/bin/sudo
ln -s /.innkeeper/bin/inn-agent /usr/bin/sudo
install -d -m 0755 /.innkeeper /.innkeeper/bin /.innkeeper/link

# runsc covers an empty /tmp with a tmpfs of its own, out of reach of the disk, its quota and the change scan.
chmod 1777 /tmp
install -d -m 0555 /tmp/.innkeeper

# screen needs two things that gVisor lacks. It is set-gid in Debian, which gVisor ignores; as an ordinary program it
# insists on a directory of mode 0777. And it needs the packet mode of terminals, see screen-packet-mode.c.
install -d -m 1777 /run/screen
install -d -m 0755 /usr/lib/innkeeper
dpkg-divert --quiet --local --rename --divert /usr/lib/innkeeper/screen --add /usr/bin/screen
chmod g-s /usr/lib/innkeeper/screen
cc -O2 -Wall -Werror -shared -fPIC -o /usr/lib/innkeeper/screen-packet-mode.so /.recipe/screen-packet-mode.c
cat > /usr/bin/screen <<'SCREEN'
#!/bin/sh
export LD_PRELOAD=/usr/lib/innkeeper/screen-packet-mode.so
exec /usr/lib/innkeeper/screen "$@"
SCREEN
chmod 0755 /usr/bin/screen
