package files

import (
	"syscall"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
)

// found is one row of an answer: an entry, by its path from the directory that was searched.
type found struct {
	Path    string `json:"path,omitempty"`
	PathB64 string `json:"path_b64,omitempty"`
	Type    string `json:"type"`
	Size    int64  `json:"size"`
	Mode    uint32 `json:"mode"`
	MtimeNs int64  `json:"mtime_ns"`
}

// Glob serves the glob verb: a page of the entries below a directory that a pattern takes.
func (s *Store) Glob(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Pattern string `json:"pattern"`
		Cursor  string `json:"cursor"`
		Limit   int    `json:"limit"`
	}{}
	err := s.Resolve(open, &request, &request.Location)
	after := ""
	var wanted *pattern
	if err == nil {
		after, err = decodeCursor("glob", request.Cursor)
	}
	if err == nil {
		wanted, err = parsePattern(request.Pattern)
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	if request.Limit < 1 || request.Limit > listLimit {
		request.Limit = listLimit
	}
	result := struct {
		Entries    []found `json:"entries"`
		Unreadable int     `json:"unreadable"`
		Next       string  `json:"next,omitempty"`
	}{Entries: []found{}}
	walk := newWalker(request.Path, after)
	walk.enter = wanted.canMatchBelow
	size := 0
	walk.visit = func(relative string, status *syscall.Stat_t) (bool, error) {
		if !wanted.matches(relative) {
			return true, nil
		}
		row := found{
			Type: typeOf(status.Mode), Size: status.Size, Mode: status.Mode & permissionBits, MtimeNs: status.Mtim.Nano(),
		}
		row.Path, row.PathB64 = encodeName(relative)
		result.Entries = append(result.Entries, row)
		size += 6*len(row.Path) + len(row.PathB64) + 110
		return len(result.Entries) < request.Limit && size < listBytes, nil
	}
	err = account.As(request.Account, func() error {
		done, err := walk.run()
		if err == nil && !done {
			result.Next = encodeCursor(walk.last)
		}
		return err
	})
	result.Unreadable = walk.unreadable
	answer(stream, err, result)
}
