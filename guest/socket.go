package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"innkeeper/guest/link"
)

const (
	redialFirst    = 10 * time.Millisecond
	redialLongest  = 100 * time.Millisecond
	generationPoll = 10 * time.Millisecond
)

// socketSource dials the host's socket, again and again.
type socketSource struct {
	path  string
	pause time.Duration
	began time.Time // of the connection before

	mu         sync.Mutex
	connection net.Conn
	quiesced   bool
	generation string // what the file said when the agent went quiet
}

func newSocketSource(path string) *socketSource {
	return &socketSource{path: path, pause: redialFirst}
}

// Next dials until the host takes the connection.
func (s *socketSource) Next() link.Connection {
	if !s.began.IsZero() {
		// A host that accepts and hangs up must not make the agent spin.
		if time.Since(s.began) > time.Second {
			s.pause = redialFirst
		}
		s.rest()
	}
	for {
		s.awaitGeneration()
		connection, err := net.Dial("unix", s.path)
		if err != nil {
			s.rest()
			continue
		}
		s.mu.Lock()
		s.connection = connection
		s.mu.Unlock()
		s.began = time.Now()
		return connection
	}
}

func (s *socketSource) rest() {
	time.Sleep(s.pause)
	if s.pause *= 2; s.pause > redialLongest {
		s.pause = redialLongest
	}
}

// Quiesce lets go of the link, without which a checkpoint of the guest is impossible.
func (s *socketSource) Quiesce(stream *link.Stream, _ link.Request) {
	generation := s.readGeneration()
	s.mu.Lock()
	s.quiesced, s.generation = true, generation
	connection := s.connection
	s.mu.Unlock()
	stream.Succeed(struct{}{})
	if connection != nil {
		_ = connection.Close()
	}
}

func (s *socketSource) awaitGeneration() {
	for {
		s.mu.Lock()
		if s.quiesced && s.readGeneration() != s.generation {
			s.quiesced = false
		}
		quiesced := s.quiesced
		s.mu.Unlock()
		if !quiesced {
			return
		}
		time.Sleep(generationPoll)
	}
}

func (s *socketSource) readGeneration() string {
	content, _ := os.ReadFile(filepath.Join(filepath.Dir(s.path), "generation"))
	return strings.TrimSpace(string(content))
}
