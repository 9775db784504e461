// Package jail is the host's way to start a virtual machine's QEMU: `inn-agent jail MARK PLAN -- COMMAND…`. It makes what the plan says, in this order and
// nothing else, and is gone when COMMAND runs. It is a part of the agent because that is the static program which every host has: a chain of the shell, mount,
// setpriv and six more took twice the time that QEMU itself takes to start.
package jail

import (
	"encoding/json"
	"fmt"
	"os"
)

// plan is the file that src/innkeeper/host/drivers/vm_jail.py writes.
type plan struct {
	// Files that a process joins its control groups by.
	Groups []string `json:"groups"`
	// The network namespace, as a file; without one, a new one that leads nowhere.
	Network string `json:"network"`
	// Whether to end when the command does. Its process group is then ours, so that one signal ends both.
	Stays bool `json:"stays"`
	// A directory of the host; the mounts' targets are paths below it. It has the empty directories `old` and `proc`.
	Root   string  `json:"root"`
	Mounts []mount `json:"mounts"`
	// The user that the command runs as, its group, and its further groups.
	UID       int    `json:"uid"`
	GID       int    `json:"gid"`
	Further   []int  `json:"further_groups"`
	OpenFiles uint64 `json:"open_files"`
	// No file of the command's grows beyond this.
	FileBytes uint64 `json:"file_bytes"`
}

// mount is a bind mount: never of set-uid programs, and without devices or read-only where that is said.
type mount struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"read_only"`
	Devices  bool   `json:"devices"`
	Programs bool   `json:"programs"`
}

func read(path string) (*plan, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	made := &plan{UID: -1, GID: -1}
	if err := json.Unmarshal(content, made); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	// What a plan leaves out must not be root's.
	if made.UID <= 0 || made.GID <= 0 || made.Root == "" || made.OpenFiles == 0 || made.FileBytes == 0 || (len(made.Groups) == 0 && !made.Stays) {
		return nil, fmt.Errorf("%s: not a whole plan", path)
	}
	return made, nil
}
