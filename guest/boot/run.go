package boot

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// fillRun makes those folders in the fresh /run that the image has in its own, such as the one that screen keeps its sockets in: nothing else in a guest
// would. Files that the image has there are of a life that is over.
func fillRun() error { return sameFolders(image+"/run", "/run") }

// sameFolders gives `to` the folders of `from`, with their modes and owners. Where `from` is no folder there are none.
func sameFolders(from, to string) error {
	return filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if os.IsNotExist(err) && path == from {
			return nil
		}
		if err != nil || !entry.IsDir() {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		target := to + strings.TrimPrefix(path, from)
		if err := os.Mkdir(target, 0o700); err != nil && !os.IsExist(err) {
			return err
		}
		if owner, known := info.Sys().(*syscall.Stat_t); known {
			if err := os.Chown(target, int(owner.Uid), int(owner.Gid)); err != nil {
				return err
			}
		}
		// After the owner, whose change takes set-id bits away.
		return os.Chmod(target, info.Mode())
	})
}
