package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"syscall"
	"unsafe"
)

const moduleFolder = "/modules"

// loadModules takes them in the order of their names, in which each follows those that it needs.
func loadModules() error {
	names, err := filepath.Glob(moduleFolder + "/*.ko")
	if err != nil {
		return err
	}
	sort.Strings(names)
	for _, name := range names {
		if err := loadModule(name); err != nil && !errors.Is(err, syscall.EEXIST) {
			return fmt.Errorf("%s: %w", filepath.Base(name), err)
		}
	}
	return nil
}

func loadModule(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	none := [1]byte{}
	if _, _, errno := syscall.Syscall(sysFinitModule, file.Fd(), uintptr(unsafe.Pointer(&none[0])), 0); errno != 0 {
		return errno
	}
	return nil
}
