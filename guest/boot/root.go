package boot

import (
	"fmt"
	"os"
	"syscall"
)

const (
	// Binary is the agent's own, for processes that it starts of it.
	Binary = binaryFolder + "/inn-agent"

	newRoot = "/root"

	// Of the guest, once it is made. The layers are root's alone: what is written to them behind the overlay's back breaks it.
	own          = "/.innkeeper"
	binaryFolder = own + "/bin"
	layers       = own + "/layers"
	image        = layers + "/image"
	disks        = layers + "/disk"
	upper        = disks + "/u"

	private = disks + "/c"

	// As host/disks/rootfs.py mounts them, so that a disk may go from one kind of guest to another.
	diskOptions     = "commit=30"
	overlayFeatures = "metacopy=off,redirect_dir=nofollow,index=off,userxattr"

	// Where the parts lie until the root is made.
	earlyImage = "/image"
	earlyDisk  = "/disk"
)

func mountImage() error {
	device, err := disk(imageSerial, "vda")
	if err != nil {
		return err
	}
	return mountAt(device, earlyImage, "erofs", syscall.MS_RDONLY|syscall.MS_NODEV|syscall.MS_NOATIME, "")
}

func mountDisk() error {
	device, err := disk(diskSerial, "vdb")
	if err != nil {
		return err
	}
	return mountAt(device, earlyDisk, "ext4", syscall.MS_NODEV|syscall.MS_NOATIME, diskOptions)
}

// mountOverlay joins them. Set-uid programs keep their meaning, unlike on the host: this kernel is the guest's own.
func mountOverlay() error {
	for _, name := range []string{"/u", "/w"} {
		if err := os.Mkdir(earlyDisk+name, 0o755); err != nil && !os.IsExist(err) {
			return err
		}
	}
	if err := os.Mkdir(earlyDisk+"/c", 0o700); err != nil && !os.IsExist(err) {
		return err
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/u,workdir=%s/w,%s", earlyImage, earlyDisk, earlyDisk, overlayFeatures)
	return mountAt("overlay", newRoot, "overlay", syscall.MS_NODEV|syscall.MS_NOATIME, options)
}

// enterRoot puts the agent and the layers into the new root, makes it the root, and gives the memory of the modules back.
func enterRoot() error {
	// A guest may have left anything in this place on its disk.
	if err := directory(newRoot + own); err != nil {
		return err
	}
	if err := mountAt("tmpfs", newRoot+own, "tmpfs", syscall.MS_NODEV|syscall.MS_NOSUID, "mode=755,size=64k"); err != nil {
		return err
	}
	if err := os.MkdirAll(newRoot+binaryFolder, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(newRoot+layers, 0o700); err != nil {
		return err
	}
	for from, to := range map[string]string{earlyImage: image, earlyDisk: disks} {
		if err := os.Mkdir(newRoot+to, 0o700); err != nil {
			return err
		}
		if err := syscall.Mount(from, newRoot+to, "", syscall.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", from, err)
		}
	}
	// The running program itself: a copy would take the memory twice.
	if err := os.WriteFile(newRoot+Binary, nil, 0o755); err != nil {
		return err
	}
	if err := syscall.Mount(Path, newRoot+Binary, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind the agent: %w", err)
	}
	if err := placeOffered(); err != nil {
		return err
	}
	for _, path := range []string{newRoot + Binary, newRoot + own} {
		if err := syscall.Mount("", path, "", syscall.MS_REMOUNT|syscall.MS_BIND|syscall.MS_RDONLY|syscall.MS_NODEV|syscall.MS_NOSUID, ""); err != nil {
			return fmt.Errorf("remount %s read-only: %w", path, err)
		}
	}
	for _, path := range []string{"/proc", "/sys", "/dev"} {
		if err := syscall.Unmount(path, syscall.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.RemoveAll(moduleFolder); err != nil {
		return err
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := syscall.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return os.Chdir("/")
}

func mountAt(source, target, kind string, flags uintptr, options string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := syscall.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s (%s) at %s: %w", source, kind, target, err)
	}
	return nil
}

// directory makes the path one, whatever was there.
func directory(path string) error {
	if status, err := os.Lstat(path); err == nil {
		if status.IsDir() {
			return nil
		}
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return os.Mkdir(path, 0o755)
}
