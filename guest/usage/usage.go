// Package usage counts what the guest uses.
package usage

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Report is the answer to the usage verb.
type Report struct {
	CPUUs         int64 `json:"cpu_us"`
	MemoryBytes   int64 `json:"memory_bytes"`
	Processes     int   `json:"processes"`
	UserProcesses int   `json:"user_processes"`
	DiskBytes     int64 `json:"disk_bytes"`
	UptimeMs      int64 `json:"uptime_ms"`
}

const ticksPerSecond = 100

// Collect reads /proc and the root file system. own are processes that belong to the agent.
func Collect(began time.Time, own map[int]bool) Report {
	report := Report{UptimeMs: time.Since(began).Milliseconds()}
	report.Processes, report.UserProcesses = Processes(own)
	report.CPUUs = processorTime()
	report.MemoryBytes = memoryInUse()
	var root syscall.Statfs_t
	if syscall.Statfs("/", &root) == nil {
		report.DiskBytes = int64(root.Blocks-root.Bfree) * root.Bsize
	}
	return report
}

// Processes counts all processes and those that neither are the agent nor belong to own. Zombies and kernel threads are not alive.
func Processes(own map[int]bool) (all, users int) {
	directory, err := os.Open("/proc")
	if err != nil {
		return 0, 0
	}
	defer directory.Close()
	names, _ := directory.Readdirnames(-1)
	self := os.Getpid()
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		all++
		// The state is read only of strangers: mostly there is none, and then this is one readdir.
		if pid != self && !own[pid] && alive(pid) {
			users++
		}
	}
	return all, users
}

var kernel struct {
	once    sync.Once
	threads bool
}

// hasKernelThreads says whether process 2 is the parent of the kernel's threads, as everywhere but in a container.
func hasKernelThreads() bool {
	kernel.once.Do(func() { // not before the first question: a machine's first process begins without /proc
		content, err := os.ReadFile("/proc/2/comm")
		kernel.threads = err == nil && string(bytes.TrimSpace(content)) == "kthreadd"
	})
	return kernel.threads
}

func alive(pid int) bool {
	// A thread of the kernel's is in group 0, which no program that the agent starts can be in. There are dozens of them, and a group costs one call,
	// a state five.
	if group, err := syscall.Getpgid(pid); err != nil || group == 0 && hasKernelThreads() {
		return false
	}
	fields := statFields("/proc/" + strconv.Itoa(pid) + "/stat")
	return len(fields) > 0 && fields[0] != "Z" && fields[0] != "X"
}

// statFields are the fields after the command, which may hold spaces and parentheses.
func statFields(path string) []string {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	end := bytes.LastIndexByte(content, ')')
	if end < 0 {
		return nil
	}
	return strings.Fields(string(content[end+1:]))
}

// processorTime is user and system time of the whole guest: /proc/stat where it is filled, else the agent and all it has collected.
func processorTime() int64 {
	content, err := os.ReadFile("/proc/stat")
	if err == nil {
		line, _, _ := strings.Cut(string(content), "\n")
		fields := strings.Fields(line)
		const user, nice, system = 1, 2, 3
		if len(fields) > system && fields[0] == "cpu" {
			var ticks int64
			for _, index := range []int{user, nice, system} {
				value, _ := strconv.ParseInt(fields[index], 10, 64)
				ticks += value
			}
			if ticks > 0 {
				return ticks * (1_000_000 / ticksPerSecond)
			}
		}
	}
	var total int64
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var used syscall.Rusage
		if syscall.Getrusage(who, &used) == nil {
			total += used.Utime.Nano()/1000 + used.Stime.Nano()/1000
		}
	}
	return total
}

func memoryInUse() int64 {
	content, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	values := map[string]int64{}
	for _, line := range strings.Split(string(content), "\n") {
		fields := strings.Fields(line)
		if len(fields) >= 2 {
			value, _ := strconv.ParseInt(fields[1], 10, 64)
			values[strings.TrimSuffix(fields[0], ":")] = value << 10
		}
	}
	free := values["MemAvailable"]
	if free == 0 {
		free = values["MemFree"]
	}
	return values["MemTotal"] - free
}
