package link

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// Error is what an ERROR frame carries.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// Errorf makes an Error with a stable code.
func Errorf(code, format string, arguments ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, arguments...)}
}

// AsError gives any error the code that its cause has in the protocol.
func AsError(err error) *Error {
	var known *Error
	if errors.As(err, &known) {
		return known
	}
	return &Error{Code: codeOf(err), Message: err.Error()}
}

func codeOf(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return "not_found"
		case errors.Is(err, fs.ErrExist):
			return "exists"
		case errors.Is(err, fs.ErrPermission):
			return "permission_denied"
		}
		return "internal"
	}
	switch errno {
	case syscall.ENOENT:
		return "not_found"
	case syscall.EISDIR:
		return "is_a_directory"
	case syscall.ENOTDIR:
		return "not_a_directory"
	case syscall.EACCES, syscall.EPERM, syscall.EROFS:
		return "permission_denied"
	case syscall.EEXIST, syscall.ENOTEMPTY:
		return "exists"
	case syscall.ENOSPC, syscall.EDQUOT:
		return "no_space"
	case syscall.EFBIG:
		return "too_large"
	case syscall.EBUSY, syscall.ETXTBSY:
		return "busy"
	case syscall.ESRCH:
		return "no_such_process"
	case syscall.EINVAL, syscall.ENAMETOOLONG, syscall.ELOOP, syscall.EXDEV:
		return "bad_request"
	}
	return "io_error"
}
