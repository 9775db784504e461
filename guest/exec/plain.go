package exec

import (
	"path/filepath"
	"strings"

	"innkeeper/guest/account"
)

// plainWords splits a command that is one external program with literal words, or returns nil.
//
// bash would only parse it and replace itself by the program. In gVisor that shell costs 5 to 20 ms, more than most programs, and a
// spare shell costs a fork instead; so such a command is started directly. Anything with a meaning for a shell is not plain.
func plainWords(line string) []string {
	var words []string
	var word strings.Builder
	inWord := false
	for at := 0; at < len(line); at++ {
		letter := line[at]
		switch {
		case letter == ' ' || letter == '\t':
			if inWord {
				words = append(words, word.String())
				word.Reset()
				inWord = false
			}
		case letter == '\'' || letter == '"':
			length := strings.IndexByte(line[at+1:], letter)
			if length < 0 || len(words) == 0 {
				return nil
			}
			quoted := line[at+1 : at+1+length]
			if letter == '"' && strings.ContainsAny(quoted, "$`\\!") {
				return nil
			}
			word.WriteString(quoted)
			inWord = true
			at += length + 1
		case isLiteral(letter) && (len(words) > 0 || letter != '=' && letter != '%'):
			word.WriteByte(letter)
			inWord = true
		default:
			return nil
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	if len(words) == 0 || shellWords[words[0]] {
		return nil
	}
	return words
}

func isLiteral(letter byte) bool {
	return letter >= 'a' && letter <= 'z' || letter >= 'A' && letter <= 'Z' || letter >= '0' && letter <= '9' ||
		strings.IndexByte("_@%+:,./-=", letter) >= 0
}

// shellWords are bash's builtins and keywords, which no program of the same name replaces.
var shellWords = wordSet(`. : [ alias bg bind break builtin caller case cd command compgen complete compopt continue coproc declare
	dirs disown do done echo elif else enable esac eval exec exit export false fc fg fi for function getopts hash help history if in
	jobs kill let local logout mapfile popd printf pushd pwd read readarray readonly return select set shift shopt source suspend
	test then time times trap true type typeset ulimit umask unalias unset until wait while`)

func wordSet(text string) map[string]bool {
	set := map[string]bool{}
	for _, word := range strings.Fields(text) {
		set[word] = true
	}
	return set
}

// direct is the plan without its shell, or nil where only a shell can run it.
func (p *plan) direct(line string) *plan {
	words := plainWords(line)
	if words == nil || p.argv[0] != "bash" {
		return nil
	}
	for _, entry := range p.environment {
		// Code that bash runs or functions that it takes from its environment.
		if strings.HasPrefix(entry, "BASH_") || strings.HasPrefix(entry, "POSIXLY_CORRECT=") || strings.HasPrefix(entry, "SHELLOPTS=") {
			return nil
		}
	}
	path, err := lookPath(words[0], value(p.environment, "PATH"), p.directory)
	if err != nil || !account.IsExecutable(absolute(path, p.directory)) {
		return nil
	}
	directory, err := filepath.EvalSymlinks(p.directory)
	if err != nil {
		return nil
	}
	replaced := *p
	replaced.path, replaced.argv = path, words
	// What bash leaves in the environment of a program that it becomes.
	left := map[string]string{"PWD": directory, "_": path}
	if value(p.environment, "SHLVL") == "" {
		left["SHLVL"] = "0"
	}
	replaced.environment = Merge(p.environment, left)
	return &replaced
}

func absolute(path, directory string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(directory, path)
}
