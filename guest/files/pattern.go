package files

import (
	"path"
	"strings"

	"innkeeper/guest/link"
)

const (
	patternBytes        = 4096
	patternAlternatives = 64
	anyDepth            = "**"
)

// pattern is a glob: names with `*`, `?`, `[...]`, and `**` for any number of directories; `{a,b}` are alternatives of the whole.
type pattern struct {
	alternatives [][]string
	// Of the directory that was asked about last: most questions are about its other names.
	folder string
	states []map[int]bool
}

func parsePattern(text string) (*pattern, error) {
	if text == "" || len(text) > patternBytes || strings.IndexByte(text, 0) >= 0 || text[0] == '/' {
		return nil, link.Errorf("bad_request", "pattern: must be relative, without NUL, of 1 to %d bytes", patternBytes)
	}
	expanded, err := expandBraces(text)
	if err != nil {
		return nil, err
	}
	p := &pattern{folder: "\x00"}
	for _, one := range expanded {
		var names []string
		for _, name := range strings.Split(one, "/") {
			if name == "" || name == "." {
				continue
			}
			if name == ".." {
				return nil, link.Errorf("bad_request", "pattern: .. leads out of the directory")
			}
			if _, err := path.Match(name, ""); err != nil {
				return nil, link.Errorf("bad_request", "pattern: %q is malformed", name)
			}
			names = append(names, name)
		}
		if len(names) == 0 {
			return nil, link.Errorf("bad_request", "pattern: names nothing")
		}
		p.alternatives = append(p.alternatives, names)
	}
	return p, nil
}

// expandBraces writes the alternatives out, the first pair of braces first.
func expandBraces(text string) ([]string, error) {
	done, waiting := []string{}, []string{text}
	for len(waiting) > 0 {
		if len(done)+len(waiting) > patternAlternatives {
			return nil, link.Errorf("bad_request", "pattern: more than %d alternatives", patternAlternatives)
		}
		one := waiting[0]
		waiting = waiting[1:]
		start, parts, end, err := firstBraces(one)
		if err != nil {
			return nil, err
		}
		if parts == nil {
			done = append(done, one)
			continue
		}
		for _, part := range parts {
			waiting = append(waiting, one[:start]+part+one[end:])
		}
	}
	return done, nil
}

func firstBraces(text string) (start int, parts []string, end int, err error) {
	start = -1
	depth, from := 0, 0
	for index := 0; index < len(text); index++ {
		switch text[index] {
		case '\\':
			index++
		case '{':
			if depth == 0 {
				start, from = index, index+1
			}
			depth++
		case ',':
			if depth == 1 {
				parts = append(parts, text[from:index])
				from = index + 1
			}
		case '}':
			if depth == 0 {
				continue
			}
			if depth--; depth == 0 {
				return start, append(parts, text[from:index]), index + 1, nil
			}
		}
	}
	if depth > 0 {
		return 0, nil, 0, link.Errorf("bad_request", "pattern: a { is not closed")
	}
	return 0, nil, 0, nil
}

// advance are the positions in names that hold after one more name of a path.
func advance(names []string, at map[int]bool, name string) map[int]bool {
	after := map[int]bool{}
	var reach func(int)
	reach = func(index int) {
		after[index] = true
		if index+1 < len(names) && names[index] == anyDepth {
			reach(index + 1) // no directory at all; the last one takes one name at least
		}
	}
	for index := range at {
		if index == len(names) {
			continue
		}
		if names[index] == anyDepth {
			reach(index)
			if index+1 == len(names) {
				after[len(names)] = true
			}
		} else if ok, _ := path.Match(names[index], name); ok {
			reach(index + 1)
		}
	}
	return after
}

// in sets the states that hold in a directory.
func (p *pattern) in(folder string) []map[int]bool {
	if folder == p.folder {
		return p.states
	}
	states := make([]map[int]bool, len(p.alternatives))
	for index, names := range p.alternatives {
		at := map[int]bool{}
		for position := 0; ; position++ {
			at[position] = true
			if names[position] != anyDepth || position+1 == len(names) {
				break
			}
		}
		for _, name := range strings.Split(folder, "/") {
			if folder != "" {
				at = advance(names, at, name)
			}
		}
		states[index] = at
	}
	p.folder, p.states = folder, states
	return states
}

func parent(relative string) (folder, name string) {
	if slash := strings.LastIndexByte(relative, '/'); slash >= 0 {
		return relative[:slash], relative[slash+1:]
	}
	return "", relative
}

// matches says whether the pattern takes a path.
func (p *pattern) matches(relative string) bool {
	folder, name := parent(relative)
	for index, at := range p.in(folder) {
		names := p.alternatives[index]
		if advance(names, at, name)[len(names)] {
			return true
		}
	}
	return false
}

// canMatchBelow says whether anything below a directory can match.
func (p *pattern) canMatchBelow(relative string) bool {
	folder, name := parent(relative)
	for index, at := range p.in(folder) {
		names := p.alternatives[index]
		for position := range advance(names, at, name) {
			if position < len(names) {
				return true
			}
		}
	}
	return false
}
