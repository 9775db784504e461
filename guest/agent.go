package main

import (
	"errors"
	"net"
	"os"
	"runtime"
	"syscall"
	"time"

	"innkeeper/guest/account"
	"innkeeper/guest/archive"
	"innkeeper/guest/configure"
	"innkeeper/guest/exec"
	"innkeeper/guest/files"
	"innkeeper/guest/link"
	"innkeeper/guest/ports"
	"innkeeper/guest/reaper"
	"innkeeper/guest/sudo"
	"innkeeper/guest/usage"
	"innkeeper/guest/volumes"
)

const (
	defaultGrace = 2000
	stacksLimit  = 64 << 10 // as JSON it has to fit a frame
)

// source is where links come from.
type source interface {
	// Next waits for the next connection to the host; the one before has ended.
	Next() link.Connection
}

// agent joins the link to the packages that serve its verbs.
type agent struct {
	links    source
	identity link.Identity
	began    time.Time
	children *reaper.Table
	table    *exec.Table
	settings *configure.Settings
	verbs    map[string]link.Handler
	end      func() // of the agent, with which the guest ends
}

func newAgent(links source) (*agent, error) {
	syscall.Umask(0o022)
	bootID, err := randomName()
	if err != nil {
		return nil, err
	}
	children := reaper.New()
	logins := account.NewLogins(children)
	table, err := exec.NewTable(children, logins)
	if err != nil {
		return nil, err
	}
	a := &agent{
		links: links, began: time.Now(), children: children, table: table, end: func() { os.Exit(0) },
		identity: link.Identity{
			Protocol: link.Protocol, MinProtocol: link.MinimumProtocol, Agent: version, BootID: bootID,
		},
	}
	a.settings = configure.New(table, sudo.NewServer(children, func() string { return table.Settings().User }))
	store := files.New(func() string { return table.Settings().User })
	trees := archive.NewTrees(children, store)
	a.verbs = map[string]link.Handler{
		"configure":   a.settings.Configure,
		"stacks":      a.stacks,
		"exec":        table.Exec,
		"attach":      table.Attach,
		"processes":   table.Processes,
		"workdir":     table.Workdir,
		"results":     table.Results,
		"signal":      table.Signal,
		"stat":        store.Stat,
		"list":        store.List,
		"read":        store.Read,
		"write":       store.Write,
		"mkdir":       store.Mkdir,
		"rename":      store.Rename,
		"remove":      store.Remove,
		"copy":        store.Copy,
		"glob":        store.Glob,
		"search":      store.Search,
		"watch":       store.Watch,
		"mime":        store.Mime,
		"pack":        archive.Pack,
		"unpack":      archive.NewUnpacker(children).Unpack,
		"pack_tree":   trees.Pack,
		"unpack_tree": trees.Unpack,
		"end_all":     a.endProcesses,
		"dial":        ports.Dial,
		"ports":       ports.List,
		"usage":       a.usage,
		"shutdown":    a.shutdown,
	}
	a.serveVolumes(volumes.Linked)
	if quiet, ok := links.(interface {
		Quiesce(*link.Stream, link.Request)
	}); ok {
		a.verbs["quiesce"] = quiet.Quiesce
	}
	return a, nil
}

func (a *agent) serveVolumes(kind func(func() string, volumes.Quiet) *volumes.Volumes) {
	found := kind(func() string { return a.table.Settings().User }, a.table.WithoutSpare)
	a.verbs["mount_volume"] = found.Mount
	a.verbs["unmount_volume"] = found.Unmount
}

// run serves one link after the other, for ever.
func (a *agent) run() {
	for {
		err := link.Serve(a.links.Next(), a.identity, a.serve)
		// Nothing broke where the agent itself let go of its link.
		if a.identity.LastError = ""; err != nil && !errors.Is(err, net.ErrClosed) {
			a.identity.LastError = err.Error()
		}
	}
}

func (a *agent) serve(stream *link.Stream, request link.Request) {
	handler := a.verbs[request.Verb]
	if handler == nil {
		stream.Fail(link.Errorf("unknown_verb", "this agent does not know %q", request.Verb))
		return
	}
	handler(stream, request)
}

func (a *agent) usage(stream *link.Stream, _ link.Request) {
	stream.Succeed(usage.Collect(a.began, a.table.OwnPids()))
}

// stacks says where every goroutine is, as far as it fits, for whoever has to find out why an agent does not answer something else.
func (a *agent) stacks(stream *link.Stream, _ link.Request) {
	text := make([]byte, stacksLimit)
	stream.Succeed(struct {
		Text string `json:"text"`
	}{string(text[:runtime.Stack(text, true)])})
}

// shutdown ends every process of the guest, then the agent, with which a guest ends.
func (a *agent) shutdown(stream *link.Stream, open link.Request) {
	request := struct {
		GraceMs *int `json:"grace_ms"`
	}{}
	if err := open.Decode(&request); err != nil {
		stream.Fail(err)
		return
	}
	grace := defaultGrace
	if request.GraceMs != nil && *request.GraceMs >= 0 {
		grace = *request.GraceMs
	}
	a.endAll(time.Duration(grace) * time.Millisecond)
	syscall.Sync()
	stream.Succeed(struct{}{})
	a.end()
}

// endProcesses ends what commands left behind, as a step of an image build does when it is over.
func (a *agent) endProcesses(stream *link.Stream, open link.Request) {
	request := struct {
		GraceMs int `json:"grace_ms"`
	}{}
	if err := open.Decode(&request); err != nil {
		stream.Fail(err)
		return
	}
	if _, users := usage.Processes(a.table.OwnPids()); users > 0 {
		a.endAll(time.Duration(request.GraceMs) * time.Millisecond)
	}
	syscall.Sync()
	stream.Succeed(struct{}{})
}

func (a *agent) endAll(grace time.Duration) {
	kill := a.table.SignalAll
	if os.Getpid() == 1 {
		// All processes of the guest, also those that left their group.
		kill = func(number syscall.Signal) { _ = syscall.Kill(-1, number) }
	}
	kill(syscall.SIGTERM)
	for deadline := time.Now().Add(grace); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if _, users := usage.Processes(a.table.OwnPids()); users == 0 {
			break
		}
	}
	kill(syscall.SIGKILL)
}
