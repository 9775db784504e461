// Package modules loads modules of the guest's kernel when the kernel asks for them, or a program does: the agent is its modprobe. It needs nothing of the image, and knows
// the modules that came with the kernel and no others.
package modules

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"
)

// Main serves `modprobe [-OPTION…] [--] NAME`, as the kernel says it; NAME is a module's, or what one says that it is for.
func Main(folder string, arguments []string) int {
	name := ""
	for _, argument := range arguments {
		if !strings.HasPrefix(argument, "-") {
			name = argument
			break
		}
	}
	if name == "" {
		fmt.Fprintln(os.Stderr, "modprobe: no name of a module")
		return 2
	}
	if err := Load(folder, name); err != nil {
		fmt.Fprintln(os.Stderr, "modprobe:", err)
		return 1
	}
	return 0
}

// Load loads the module of that name, or those that are for it, behind what they need. What is loaded already is fine. The folder has NAME.ko.gz and what
// src/innkeeper/host/kernels/modules.py says of them.
func Load(folder, name string) error {
	needs, err := dependencies(folder)
	if err != nil {
		return err
	}
	wanted := []string{plain(name)}
	if _, known := needs[wanted[0]]; !known {
		if wanted, err = aliases(folder, name); err != nil {
			return err
		}
	}
	err = fmt.Errorf("there is no module %s", name)
	for _, module := range wanted {
		needed, known := needs[module]
		if !known {
			continue
		}
		// What it needs most is at the end, as depmod has it.
		for index := len(needed) - 1; index >= 0; index-- {
			if err = unpack(folder, needed[index]); err != nil {
				return err
			}
		}
		if err = unpack(folder, module); err != nil {
			return err
		}
	}
	return err
}

// plain is a module's name as the kernel has it.
func plain(name string) string { return strings.ReplaceAll(name, "-", "_") }

func dependencies(folder string) (map[string][]string, error) {
	needs := map[string][]string{}
	err := eachLine(filepath.Join(folder, "modules.dep"), func(line string) {
		module, rest, _ := strings.Cut(line, ":")
		needs[module] = strings.Fields(rest)
	})
	return needs, err
}

func aliases(folder, name string) ([]string, error) {
	var found []string
	err := eachLine(filepath.Join(folder, "modules.alias"), func(line string) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[0] != "alias" {
			return
		}
		// Underscores and dashes are the same in both.
		if matches, err := path.Match(plain(fields[1]), plain(name)); err == nil && matches {
			found = append(found, plain(fields[2]))
		}
	})
	return found, err
}

func eachLine(name string, take func(string)) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		take(lines.Text())
	}
	return lines.Err()
}

func unpack(folder, module string) error {
	if _, err := os.Stat("/sys/module/" + module + "/initstate"); err == nil {
		return nil
	}
	file, err := os.Open(filepath.Join(folder, module+".ko.gz"))
	if err != nil {
		return err
	}
	defer file.Close()
	packed, err := gzip.NewReader(file)
	if err != nil {
		return fmt.Errorf("%s: %w", module, err)
	}
	content, err := io.ReadAll(packed)
	if err != nil {
		return fmt.Errorf("%s: %w", module, err)
	}
	none := [1]byte{}
	_, _, errno := syscall.Syscall(syscall.SYS_INIT_MODULE, uintptr(unsafe.Pointer(&content[0])), uintptr(len(content)), uintptr(unsafe.Pointer(&none[0])))
	if errno != 0 && errno != syscall.EEXIST {
		return fmt.Errorf("%s: %w", module, errno)
	}
	return nil
}
