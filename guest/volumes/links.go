package volumes

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"innkeeper/guest/link"
)

// hub is where the host's mounts appear. Only they can be written, not the directory.
const hub = "/.innkeeper/volumes"

// links shows volumes by symlinks. gVisor lets nobody mount who has not CAP_SYS_ADMIN, which the agent is better off without: every program of root's could
// take it from the agent.
type links struct {
	// Directories that symlinks stand in place of, by volume.
	replaced map[string]syscall.Stat_t
}

func (l *links) show(volume string, at *place, _ bool) (string, error) {
	root := hub + "/" + volume
	if err := isMounted(root); err != nil {
		return "", err
	}
	if target := at.target(); target == root {
		return root, nil
	} else if strings.HasPrefix(target, hub+"/") {
		// What a machine that has ended left on the disk.
		if err := at.removeLink(); err != nil {
			return "", err
		}
	}
	before, err := at.emptyDirectory()
	if err != nil {
		return "", err
	}
	if before != nil {
		if err := at.removeDirectory(); err != nil {
			return "", err
		}
		l.replaced[volume] = *before
	}
	if err := at.makeLink(root); err != nil {
		l.putBack(volume, at)
		return "", err
	}
	return root, nil
}

func (l *links) hide(volume string, at *place) error {
	root := hub + "/" + volume
	if found := users(root); found != "" {
		return link.Errorf("busy", "the volume is in use: %s", found)
	}
	if at != nil && at.target() == root {
		if err := at.removeLink(); err != nil {
			return err
		}
		l.putBack(volume, at)
	}
	// The sandbox keeps what it has seen of a directory open, until it sees that the directory is another one: once the host has taken the mount away,
	// this is what lets go of it.
	_, _ = os.ReadDir(root)
	return nil
}

func (l *links) putBack(volume string, at *place) {
	before, replaced := l.replaced[volume]
	if !replaced {
		return
	}
	delete(l.replaced, volume)
	if at.makeDirectory(0o700) != nil {
		// Somebody else's path by now is left as it is.
		return
	}
	if made, err := at.openDirectory(); err == nil {
		_ = made.Chown(int(before.Uid), int(before.Gid))
		_ = syscall.Fchmod(int(made.Fd()), before.Mode&0o7777)
		_ = made.Close()
	}
}

// isMounted tells by the file systems' sizes: to a guest of gVisor both are one device.
func isMounted(root string) error {
	var above, found syscall.Statfs_t
	if err := syscall.Statfs(hub, &above); err != nil {
		return fmt.Errorf("%s: %w", hub, err)
	}
	if err := syscall.Statfs(root, &found); err != nil {
		return fmt.Errorf("%s: %w", root, err)
	}
	if found.Blocks == above.Blocks && found.Files == above.Files {
		return link.Errorf("not_found", "the host has not mounted the volume")
	}
	return nil
}
