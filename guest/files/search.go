package files

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
)

const (
	searchBytes     = 64 << 20 // read for one page
	searchLine      = 64 << 10 // of a line that is longer, pieces of this size are looked at one by one
	searchQuery     = 1024
	searchText      = 512 // of a line, around its first match
	searchLineLimit = 1000
	binaryBytes     = 8 << 10
)

type searchMatch struct {
	Path    string `json:"path,omitempty"`
	PathB64 string `json:"path_b64,omitempty"`
	Line    int64  `json:"line"`
	Column  int64  `json:"column"` // of the first match, in bytes, from 1
	Text    string `json:"text"`
	Cut     bool   `json:"cut"` // whether text is a part of the line
}

type searchResult struct {
	Matches []searchMatch `json:"matches"`
	// Files that were passed over: not text, or not to be opened; and lines in which a match across the edge of two pieces was not seen.
	Binary     int    `json:"binary"`
	Unreadable int    `json:"unreadable"`
	LongLines  int    `json:"long_lines"`
	Next       string `json:"next,omitempty"`
}

type search struct {
	expression *regexp.Regexp
	literal    []byte
	limit      int
	left       int64
	deadline   time.Time
	size       int
	reader     *bufio.Reader
	result     searchResult
}

// place is where a page ended inside a file: the byte that comes next, the lines before it, and the bytes of its line before it.
type place struct {
	path   string
	offset int64
	line   int64
	into   int64
}

func (p place) cursor() string {
	return encodeCursor(fmt.Sprintf("%s\x00%d\x00%d\x00%d", p.path, p.offset, p.line, p.into))
}

func parsePlace(cursor string) (place, error) {
	text, err := decodeCursor("search", cursor)
	if err != nil || text == "" {
		return place{}, err
	}
	if parts := strings.Split(text, "\x00"); len(parts) == 4 {
		at := place{path: parts[0]}
		valid := true
		for index, number := range []*int64{&at.offset, &at.line, &at.into} {
			*number, err = strconv.ParseInt(parts[index+1], 10, 64)
			valid = valid && err == nil && *number >= 0
		}
		if valid {
			return at, nil
		}
	}
	return place{}, link.Errorf("bad_request", "search: not a cursor")
}

// Search serves the search verb: a page of the lines of text files below a directory, or of one file, that hold something.
func (s *Store) Search(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Query      string `json:"query"`
		Regex      bool   `json:"regex"`
		IgnoreCase bool   `json:"ignore_case"`
		Include    string `json:"include"`
		Cursor     string `json:"cursor"`
		Limit      int    `json:"limit"`
	}{}
	err := s.Resolve(open, &request, &request.Location)
	work := &search{limit: request.Limit, left: searchBytes, deadline: time.Now().Add(walkTime), result: searchResult{Matches: []searchMatch{}}}
	if work.limit < 1 || work.limit > searchLineLimit {
		work.limit = searchLineLimit
	}
	if err == nil {
		err = work.compile(request.Query, request.Regex, request.IgnoreCase)
	}
	var include *pattern
	if err == nil && request.Include != "" {
		text := request.Include
		if !strings.Contains(text, "/") {
			text = anyDepth + "/" + text
		}
		include, err = parsePattern(text)
	}
	var from place
	if err == nil {
		from, err = parsePlace(request.Cursor)
	}
	if err == nil {
		err = account.As(request.Account, func() error { return work.run(request.Path, include, from) })
	}
	answer(stream, err, &work.result)
}

func (s *search) compile(query string, isRegex, ignoreCase bool) (err error) {
	if query == "" || len(query) > searchQuery {
		return link.Errorf("bad_request", "query: must have 1 to %d bytes", searchQuery)
	}
	if !isRegex && !ignoreCase {
		s.literal = []byte(query)
		return nil
	}
	if !isRegex {
		query = regexp.QuoteMeta(query)
	}
	if ignoreCase {
		query = "(?i)" + query
	}
	if s.expression, err = regexp.Compile(query); err != nil {
		return link.Errorf("bad_request", "query: %v", err)
	}
	return nil
}

// run searches the file or the tree at root from a place on; the empty path is root itself.
func (s *search) run(root string, include *pattern, from place) error {
	var status syscall.Stat_t
	if err := syscall.Stat(root, &status); err != nil {
		return wrap("stat", root, err)
	}
	if status.Mode&syscall.S_IFMT != syscall.S_IFDIR {
		file, _, err := openRegular(root)
		if err != nil {
			return err
		}
		next, err := s.file(file, from)
		s.stopped(next)
		return err
	}
	if from.offset > 0 {
		file, err := openUnfollowed(root + "/" + from.path)
		if err == nil {
			next, err := s.file(file, from)
			if err != nil {
				s.result.Unreadable++
			} else if s.stopped(next) {
				return nil
			}
		}
	}
	walk := newWalker(root, from.path)
	walk.enter = func(relative string) bool { return include == nil || include.canMatchBelow(relative) }
	stopped := false
	walk.visit = func(relative string, status *syscall.Stat_t) (bool, error) {
		if status.Mode&syscall.S_IFMT != syscall.S_IFREG || include != nil && !include.matches(relative) {
			return true, nil
		}
		file, err := openUnfollowed(root + "/" + relative)
		if err != nil {
			s.result.Unreadable++
			return true, nil
		}
		next, err := s.file(file, place{path: relative})
		if err != nil {
			s.result.Unreadable++
			return true, nil
		}
		stopped = s.stopped(next)
		return !stopped && s.left > 0, nil
	}
	done, err := walk.run()
	s.result.Unreadable += walk.unreadable
	if err == nil && !done && !stopped {
		s.result.Next = place{path: walk.last}.cursor()
	}
	return err
}

func (s *search) stopped(next *place) bool {
	if next == nil {
		return false
	}
	s.result.Next = next.cursor()
	return true
}

// file goes through one file's lines; it returns where to go on, nil at the end.
func (s *search) file(file *os.File, at place) (*place, error) {
	defer file.Close()
	if at.offset > 0 {
		if _, err := file.Seek(at.offset, io.SeekStart); err != nil {
			return nil, err
		}
	}
	if s.reader == nil {
		s.reader = bufio.NewReaderSize(nil, searchLine)
	}
	s.reader.Reset(file)
	if at.offset == 0 {
		head, err := s.reader.Peek(binaryBytes)
		if err != nil && err != io.EOF {
			return nil, err
		}
		if bytes.IndexByte(head, 0) >= 0 {
			s.result.Binary++
			return nil, nil
		}
	}
	unchecked := 0
	for {
		piece, err := s.reader.ReadSlice('\n')
		if err != nil && err != io.EOF && err != bufio.ErrBufferFull {
			return nil, err
		}
		whole := err == nil
		s.piece(at, bytes.TrimRight(piece, "\r\n"), err == bufio.ErrBufferFull)
		s.left -= int64(len(piece))
		at.offset += int64(len(piece))
		at.into += int64(len(piece))
		if whole {
			at.line, at.into = at.line+1, 0
		}
		if err == io.EOF {
			return nil, nil
		}
		if unchecked += len(piece) + 1; unchecked > searchLine {
			unchecked = 0
			if time.Now().After(s.deadline) {
				return &at, nil
			}
		}
		if s.left <= 0 || len(s.result.Matches) >= s.limit || s.size >= listBytes {
			return &at, nil
		}
	}
}

// piece looks at a line, or at one part of a long one.
func (s *search) piece(at place, piece []byte, part bool) {
	if part && at.into == 0 {
		s.result.LongLines++
	}
	first := -1
	if s.literal != nil {
		first = bytes.Index(piece, s.literal)
	} else if found := s.expression.FindIndex(piece); found != nil {
		first = found[0]
	}
	if first < 0 || len(piece) == 0 && at.into > 0 {
		return
	}
	match := searchMatch{Line: at.line + 1, Column: at.into + int64(first) + 1, Cut: part || at.into > 0}
	match.Path, match.PathB64 = encodeName(at.path)
	if len(piece) > searchText {
		from := first - searchText/4
		if from < 0 {
			from = 0
		}
		to := from + searchText
		if to > len(piece) {
			to = len(piece)
		}
		piece, match.Cut = piece[from:to], true
	}
	match.Text = strings.ToValidUTF8(string(piece), "\uFFFD")
	s.result.Matches = append(s.result.Matches, match)
	s.size += 6*(len(match.Path)+len(match.Text)) + len(match.PathB64) + 100
}
