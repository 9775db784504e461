// Package sudo is both ends of the guest's sudo: gVisor ignores set-uid bits, so PID 1 runs the command for the caller.
package sudo

import (
	"fmt"
	"strings"
)

// options are what a command line asked for.
type options struct {
	user        string
	group       string
	login       bool // -i
	shell       bool // -s
	preserve    bool // -E
	keep        []string
	directory   string
	assignments []string
	command     []string
	only        action
}

type action int

const (
	run action = iota
	nothing
	list
	help
	showVersion
)

const usageText = `usage: sudo [-EHinS] [-u user] [-g group] [-D directory] [--preserve-env[=list]] [VAR=value] [-i | -s] [command [arg ...]]
       sudo -v | -k | -K | -l | -V | -h
`

// long options that take a value, and their short forms.
var longValues = map[string]byte{
	"user": 'u', "group": 'g', "chdir": 'D', "prompt": 'p', "close-from": 'C', "chroot": 'R', "command-timeout": 'T',
	"other-user": 'U', "host": 'O', "role": 'r', "type": 't',
}

var longFlags = map[string]byte{
	"login": 'i', "shell": 's', "preserve-env": 'E', "set-home": 'H', "non-interactive": 'n', "stdin": 'S', "validate": 'v',
	"reset-timestamp": 'k', "remove-timestamp": 'K', "list": 'l', "version": 'V', "help": 'h', "background": 'b',
	"edit": 'e', "askpass": 'A', "bell": 'B', "preserve-groups": 'P', "no-update": 'N',
}

// parse reads a command line as sudo does: options, assignments, then the command.
func parse(arguments []string) (*options, error) {
	o := &options{}
	reset := false
	for len(arguments) > 0 {
		word := arguments[0]
		if word == "--" {
			arguments = arguments[1:]
			break
		}
		if len(word) < 2 || word[0] != '-' {
			break
		}
		arguments = arguments[1:]
		var err error
		if strings.HasPrefix(word, "--") {
			arguments, err = o.long(word[2:], arguments, &reset)
		} else {
			arguments, err = o.short(word[1:], arguments, &reset)
		}
		if err != nil {
			return nil, err
		}
	}
	for len(arguments) > 0 && isAssignment(arguments[0]) {
		o.assignments = append(o.assignments, arguments[0])
		arguments = arguments[1:]
	}
	o.command = arguments
	switch {
	case o.only != run:
	case len(o.command) == 0 && reset:
		o.only = nothing
	case o.login && o.shell:
		return nil, fmt.Errorf("you may not specify both the -i and -s options")
	case len(o.command) == 0 && !o.login && !o.shell:
		return nil, fmt.Errorf("a command is required")
	}
	return o, nil
}

func isAssignment(word string) bool {
	name, _, found := strings.Cut(word, "=")
	return found && name != "" && !strings.Contains(name, "/")
}

func (o *options) long(word string, rest []string, reset *bool) ([]string, error) {
	name, value, has := strings.Cut(word, "=")
	if name == "preserve-env" && has {
		o.keep = append(o.keep, strings.Split(value, ",")...)
		return rest, nil
	}
	if letter, ok := longFlags[name]; ok && !has {
		return rest, o.flag(letter, reset)
	}
	letter, ok := longValues[name]
	if !ok {
		return nil, fmt.Errorf("unrecognized option '--%s'", word)
	}
	if !has {
		if len(rest) == 0 {
			return nil, fmt.Errorf("option '--%s' requires an argument", name)
		}
		value, rest = rest[0], rest[1:]
	}
	return rest, o.valued(letter, value)
}

func (o *options) short(letters string, rest []string, reset *bool) ([]string, error) {
	for at := 0; at < len(letters); at++ {
		letter := letters[at]
		if !strings.ContainsRune("ugDpCRTUrt", rune(letter)) {
			if err := o.flag(letter, reset); err != nil {
				return nil, err
			}
			continue
		}
		value := letters[at+1:]
		if value == "" {
			if len(rest) == 0 {
				return nil, fmt.Errorf("option requires an argument -- '%c'", letter)
			}
			value, rest = rest[0], rest[1:]
		}
		return rest, o.valued(letter, value)
	}
	return rest, nil
}

func (o *options) flag(letter byte, reset *bool) error {
	switch letter {
	case 'i':
		o.login = true
	case 's':
		o.shell = true
	case 'E':
		o.preserve = true
	case 'H', 'n', 'S', 'A', 'B', 'N': // home is always the target's, and no password is ever asked for
	case 'k':
		*reset = true
	case 'v', 'K':
		o.only = nothing
	case 'l':
		o.only = list
	case 'V':
		o.only = showVersion
	case 'h':
		o.only = help
	case 'b', 'e', 'P':
		return fmt.Errorf("the option -%c is not supported by this guest's sudo", letter)
	default:
		return fmt.Errorf("invalid option -- '%c'", letter)
	}
	return nil
}

func (o *options) valued(letter byte, value string) error {
	switch letter {
	case 'u':
		o.user = strings.TrimPrefix(value, "#")
	case 'g':
		o.group = value
	case 'D':
		o.directory = value
	case 'p', 'U':
	default:
		return fmt.Errorf("the option -%c is not supported by this guest's sudo", letter)
	}
	return nil
}
