# What the project asks of apt: the packages, and installing them. Sourced by the other scripts of this folder, from the checkout's top.
# shellcheck shell=bash disable=SC2034  # the lists are for those who source this

# Older releases of runsc have neither systrap nor the flags the driver uses.
oldest_runsc=2023
# A server needs these, and runsc. The Debian package depends on them.
server_packages=(
    ca-certificates debian-archive-keyring mmdebstrap erofs-utils skopeo umoci e2fsprogs xfsprogs util-linux mount kmod
    iproute2 nftables python3
)
# MicroVMs need these besides. The Debian package recommends them.
microvm_packages=(qemu-system-x86)
# A checkout is built besides: the guest agent, the Python environment.
build_packages=(golang-go python3-venv curl)
test_packages=(git procps shellcheck apt-utils docker-registry musl-tools openssh-client chromium "${microvm_packages[@]}")
bench_packages=(bubblewrap crun)
# apt-ftparchive, which indexes the bundle.
package_packages=(apt-utils)
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)

say() { printf '%s\n' "-- $*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Of the packages named, those that are not installed.
missing_packages() {
    local installed
    # dpkg-query fails when it has never heard of one of them.
    installed=" $({ dpkg-query --show --showformat='${db:Status-Status}=${Package}\n' "$@" 2> /dev/null || true; } |
        sed -n 's/^installed=//p' | tr '\n' ' ') "
    for package in "$@"; do
        case $installed in
            *" $package "*) ;;
            *) printf '%s\n' "$package" ;;
        esac
    done
}

# The release of runsc as a number like 20240729; 0 where there is none. The package's own record costs nothing, the
# binary of an operator who brought another one is asked.
runsc_release() {
    local version
    version=$(dpkg-query --show --showformat='${db:Status-Status} ${Version}' runsc 2> /dev/null || true)
    case $version in
        "installed "*) ;;
        *) version=$(runsc --version 2> /dev/null | head -n 1 || true) ;;
    esac
    [[ $version =~ (20[0-9]{6}) ]] && printf '%s' "${BASH_REMATCH[1]}" || printf '0'
}

fresh_enough() { [ "${1:0:4}" -ge "$oldest_runsc" ]; }

apt() {
    DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes \
        apt-get -qq -o DPkg::Lock::Timeout=300 -o DPkg::Use-Pty=false -o Acquire::Retries=3 "$@"
}

# Says how far apt is; its own lines go to the file $1.
apt_with_progress() { # $1: file for apt's output, then apt's arguments
    local output=$1 kind percent said=-10
    shift
    # The pipe carries apt's status lines, `pmstatus:package:percent:what`; its standard output and errors go to the file.
    { apt -o APT::Status-Fd=3 "$@" 3>&1 > "$output" 2>&1 < /dev/null; } |
        while IFS=: read -r kind _ percent _; do
            percent=${percent%%.*}
            case $kind in dlstatus) kind=downloading ;; pmstatus) kind=unpacking ;; *) continue ;; esac
            if [ "$percent" -lt "$said" ]; then said=-10; fi
            if [ "$percent" -ge $((said + 20)) ]; then
                said=$((percent - percent % 20))
                say "$kind packages: $percent %"
            fi
        done
}

install_packages() {
    local wanted=("$@") sources=() scratch
    say "installing: ${wanted[*]}"
    scratch=$(mktemp -d)
    # apt reads and downloads as a user of its own.
    chmod 755 "$scratch"
    # shellcheck disable=SC2064  # the directory of now, whatever the variable says then
    trap "rm -rf '$scratch'" EXIT
    apt update || say 'some package sources could not be read; going on with what is known'
    # shellcheck disable=SC2119  # this script's own arguments are not for it
    if printf '%s\n' "${wanted[@]}" | grep -qx runsc && ! fresh_enough "$(candidate_release)"; then
        backports_sources "$scratch"
        # The host's own list of sources stays as it is: backports are known to these calls alone.
        sources=(-o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$scratch/sources" -o "Dir::State::Lists=$scratch/lists")
        say "runsc comes from $codename-backports: the one in $codename is too old"
        apt "${sources[@]}" update || true
        wanted=("${wanted[@]/%runsc/runsc/$codename-backports}")
    fi
    apt_with_progress "$scratch/output" ${sources[@]+"${sources[@]}"} install --yes --no-install-recommends "${wanted[@]}" || {
        tail -n 20 "$scratch/output" >&2
        die "apt could not install: ${wanted[*]}"
    }
}

# The release of runsc that apt would install, likewise; it takes options for apt.
# shellcheck disable=SC2120  # setup/bundle.sh gives some
candidate_release() {
    local version
    version=$(apt-cache "$@" policy runsc 2> /dev/null | sed -n 's/^ *Candidate: //p')
    [[ $version =~ (20[0-9]{6}) ]] && printf '%s' "${BASH_REMATCH[1]}" || printf '0'
}

# The host's own sources and, beside them, backports from the mirror that the host uses for Debian itself.
backports_sources() { # $1: scratch directory
    mkdir -p "$1/sources" "$1/lists/partial"
    chown _apt "$1/lists/partial" 2> /dev/null || true
    cp -a /etc/apt/sources.list.d/. "$1/sources/" 2> /dev/null || true
    if [ -f /etc/apt/sources.list ]; then cp /etc/apt/sources.list "$1/sources/host.list"; fi
    backports_line > "$1/sources/innkeeper-backports.list"
}

backports_line() {
    local mirror
    mirror=$(debian_sources "Codename: $codename" | cut -d ' ' -f 3 | head -n 1)
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s-backports main\n' \
        "${mirror:-http://deb.debian.org/debian/}" "$codename"
}

# Of the host's sources those of Debian itself, a line each, whatever form they are written in; narrowed by apt's filters.
debian_sources() {
    # shellcheck disable=SC2016  # apt expands these itself
    apt-get indextargets --format 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' 'Origin: Debian' "$@" 2> /dev/null | sort -u || true
}

ensure_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    if ! fresh_enough "$(runsc_release)"; then missing+=(runsc); fi
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
    fresh_enough "$(runsc_release)" || die "runsc of $oldest_runsc or newer is needed, and $codename has none; put one in /usr/local/bin"
}
