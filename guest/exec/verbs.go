package exec

import (
	"encoding/base64"
	"encoding/json"
	"syscall"
	"time"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
	"innkeeper/guest/terminal"
)

// Exec serves the exec verb.
func (t *Table) Exec(stream *link.Stream, open link.Request) {
	var request Request
	if err := open.Decode(&request); err != nil {
		stream.Fail(err)
		return
	}
	p, err := t.start(&request)
	if err != nil {
		stream.Fail(err)
		return
	}
	p.mu.Lock()
	p.reader = stream
	if stream.SendMessage(startedMessage{Started: true, Pid: p.child.Pid}) != nil {
		p.detach()
	}
	p.mu.Unlock()
	go p.watch(time.Duration(request.TimeoutMs) * time.Millisecond)
	p.serve(stream, request.DetachOnCancel)
}

// Attach serves the attach verb.
func (t *Table) Attach(stream *link.Stream, open link.Request) {
	var request struct {
		ID     string `json:"id"`
		Offset int64  `json:"offset"`
	}
	if err := open.Decode(&request); err != nil {
		stream.Fail(err)
		return
	}
	p, err := t.find(request.ID)
	if err == nil {
		err = p.attach(stream, request.Offset)
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	// Whoever looks at a process that somebody else started does not end it by going away.
	p.serve(stream, true)
}

// Processes serves the processes verb.
func (t *Table) Processes(stream *link.Stream, _ link.Request) {
	stream.Succeed(struct {
		Executions    []Entry `json:"executions"`
		UserProcesses int     `json:"user_processes"`
	}{t.List(), t.UserProcesses()})
}

// Signal serves the signal verb.
func (t *Table) Signal(stream *link.Stream, open link.Request) {
	var request struct {
		ID      string `json:"id"`
		Signal  int    `json:"signal"`
		Group   *bool  `json:"group"`
		Session bool   `json:"session"`
	}
	err := open.Decode(&request)
	if err == nil {
		var p *Process
		if p, err = t.find(request.ID); err == nil {
			if request.Session {
				err = p.signalSession(request.Signal)
			} else {
				err = p.signal(request.Signal, request.Group == nil || *request.Group)
			}
		}
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	stream.Succeed(struct{}{})
}

const lastSignal = 64

func (p *Process) signal(number int, group bool) error {
	if number < 1 || number > lastSignal {
		return link.Errorf("bad_request", "%d is no signal", number)
	}
	if p.cell != nil {
		// An interrupt is for the interpreter, which makes an exception of it; anything else is for all that it started, too.
		return p.signalCell(syscall.Signal(number), group && syscall.Signal(number) != syscall.SIGINT)
	}
	return p.table.children.Signal(p.child, syscall.Signal(number), group)
}

// signalSession reaches every process group of the session: jobs of a shell have groups of their own.
func (p *Process) signalSession(number int) error {
	if number < 1 || number > lastSignal {
		return link.Errorf("bad_request", "%d is no signal", number)
	}
	terminal.Signal(p.child.Pid, syscall.Signal(number))
	return nil
}

// obey handles the MESSAGEs of the opener that have come; what it does not understand it leaves alone. Of several sizes only the last one counts.
func (p *Process) obey(stream *link.Stream) {
	var size *terminal.Size
	for message := stream.TakeMessage(); message != nil; message = stream.TakeMessage() {
		var order struct {
			Signal *int           `json:"signal"`
			Resize *terminal.Size `json:"resize"`
		}
		if json.Unmarshal(message, &order) != nil {
			continue
		}
		if order.Signal != nil {
			_ = p.signal(*order.Signal, true)
		}
		if order.Resize != nil {
			size = order.Resize
		}
	}
	if size != nil {
		p.resize(*size)
	}
}

// RunQuietly runs a shell line as the default user and waits for its end; its output is dropped.
func (t *Table) RunQuietly(line string) {
	made, err := t.plan(&Request{Shell: &line})
	if err != nil {
		return
	}
	null := t.null.Fd()
	child, err := t.children.Start(made.path, made.argv, &syscall.ProcAttr{
		Dir: made.directory, Env: made.environment, Files: []uintptr{null, null, null},
		Sys: &syscall.SysProcAttr{Setsid: true, Credential: made.user.Credential()},
	})
	if err == nil {
		<-child.Done
	}
}

// Workdir serves the workdir verb: where commands begin that name no directory.
func (t *Table) Workdir(stream *link.Stream, _ link.Request) {
	settings := t.Settings()
	user, err := account.Lookup(settings.User)
	if err != nil {
		stream.Fail(err)
		return
	}
	stream.Succeed(struct {
		PathB64 string `json:"path_b64"`
	}{base64.StdEncoding.EncodeToString([]byte(defaultDirectory(settings, user)))})
}
