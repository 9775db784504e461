package volumes

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// As many as a message names.
const namedUsers = 5

// users names the processes that have something at or below a directory open, or stand in it; empty where none has.
func users(directory string) string {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return ""
	}
	var found []string
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() || !uses(pid, directory) {
			continue
		}
		if len(found) == namedUsers {
			return strings.Join(found, ", ") + " and others"
		}
		found = append(found, fmt.Sprintf("%s (%d)", nameOf(pid), pid))
	}
	return strings.Join(found, ", ")
}

func uses(pid int, directory string) bool {
	process := fmt.Sprintf("/proc/%d/", pid)
	opened, _ := filepath.Glob(process + "fd/*")
	for _, path := range append(opened, process+"cwd", process+"root", process+"exe") {
		if target, err := os.Readlink(path); err == nil && below(target, directory) {
			return true
		}
	}
	maps, err := os.ReadFile(process + "maps")
	return err == nil && strings.Contains(string(maps), " "+directory+"/")
}

func below(path, directory string) bool {
	return path == directory || strings.HasPrefix(path, directory+"/")
}

func nameOf(pid int) string {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "a process"
	}
	return strings.TrimSpace(string(name))
}
