// Package sudo is both ends of the guest's sudo.
package sudo

import (
	"fmt"
	"os"

	"innkeeper/guest/account"
	"innkeeper/guest/exec"
	"innkeeper/guest/reaper"
)

// Server runs commands as other users for the configured user.
type Server struct{}

// NewServer starts its commands through children.
func NewServer(_ *reaper.Table, _ *account.Logins, _ *exec.Table) *Server { return &Server{} }

// Allow opens or closes it.
func (s *Server) Allow(bool) error { return nil }

// Main is the client.
func Main([]string) int {
	fmt.Fprintln(os.Stderr, "sudo: not available in this guest")
	return 1
}
