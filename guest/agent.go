package main

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
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
)

const (
	redialFirst    = 10 * time.Millisecond
	redialLongest  = 100 * time.Millisecond
	generationPoll = 10 * time.Millisecond
	defaultGrace   = 2000
	stacksLimit    = 64 << 10 // as JSON it has to fit a frame
)

// agent joins the link to the packages that serve its verbs.
type agent struct {
	socket   string
	identity link.Identity
	began    time.Time
	children *reaper.Table
	table    *exec.Table
	settings *configure.Settings
	verbs    map[string]link.Handler

	mu         sync.Mutex
	connection net.Conn
	quiesced   bool
	generation string // what the file said when the agent went quiet
}

func newAgent(socket, bootID string) (*agent, error) {
	syscall.Umask(0o022)
	children := reaper.New()
	logins := account.NewLogins(children)
	table, err := exec.NewTable(children, logins)
	if err != nil {
		return nil, err
	}
	a := &agent{
		socket: socket, began: time.Now(), children: children, table: table,
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
		"quiesce":     a.quiesce,
		"shutdown":    a.shutdown,
	}
	return a, nil
}

// run dials, serves and redials for ever.
func (a *agent) run() {
	pause := redialFirst
	for {
		a.awaitGeneration()
		connection, err := net.Dial("unix", a.socket)
		if err != nil {
			time.Sleep(pause)
			if pause *= 2; pause > redialLongest {
				pause = redialLongest
			}
			continue
		}
		a.mu.Lock()
		a.connection = connection
		a.mu.Unlock()
		began := time.Now()
		if err := link.Serve(connection, a.identity, a.serve); err != nil {
			a.identity.LastError = err.Error()
		}
		a.mu.Lock()
		a.connection = nil
		a.mu.Unlock()
		// A host that accepts and hangs up must not make the agent spin.
		if time.Since(began) > time.Second {
			pause = redialFirst
		}
		time.Sleep(pause)
		if pause *= 2; pause > redialLongest {
			pause = redialLongest
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

// quiesce lets go of the link, without which a checkpoint of the guest is impossible.
func (a *agent) quiesce(stream *link.Stream, _ link.Request) {
	generation := a.readGeneration()
	a.mu.Lock()
	a.quiesced, a.generation = true, generation
	connection := a.connection
	a.mu.Unlock()
	stream.Succeed(struct{}{})
	if connection != nil {
		_ = connection.Close()
	}
}

func (a *agent) awaitGeneration() {
	for {
		a.mu.Lock()
		if a.quiesced && a.readGeneration() != a.generation {
			a.quiesced = false
		}
		quiesced := a.quiesced
		a.mu.Unlock()
		if !quiesced {
			return
		}
		time.Sleep(generationPoll)
	}
}

func (a *agent) readGeneration() string {
	content, _ := os.ReadFile(filepath.Join(filepath.Dir(a.socket), "generation"))
	return strings.TrimSpace(string(content))
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
	os.Exit(0)
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
