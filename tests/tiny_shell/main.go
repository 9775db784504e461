// A shell of a few words in one static file: what stands for images that have no bash, no C library and no /etc/passwd.
//
//	sh -c 'echo a b > /file; cat /file; id; exit 3'
package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	if len(os.Args) < 3 || os.Args[1] != "-c" {
		os.Exit(2)
	}
	for _, command := range strings.Split(os.Args[2], ";") {
		run(strings.Fields(command))
	}
}

func run(words []string) {
	out := os.Stdout
	if at := len(words) - 2; at > 0 && words[at] == ">" {
		file, err := os.Create(words[at+1])
		check(err)
		defer file.Close()
		out, words = file, words[:at]
	}
	if len(words) == 0 {
		return
	}
	switch words[0] {
	case "echo":
		fmt.Fprintln(out, os.ExpandEnv(strings.Join(words[1:], " ")))
	case "cat":
		content, err := os.ReadFile(words[1])
		check(err)
		_, _ = out.Write(content)
	case "sleep":
		seconds, err := strconv.ParseFloat(words[1], 64)
		check(err)
		time.Sleep(time.Duration(seconds * float64(time.Second)))
	case "id":
		fmt.Fprintln(out, os.Getuid(), os.Getgid(), os.Getenv("HOME"))
	case "exit":
		code, _ := strconv.Atoi(words[1])
		os.Exit(code)
	default:
		fmt.Fprintf(os.Stderr, "sh: %s: not found\n", words[0])
		os.Exit(127)
	}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "sh:", err)
		os.Exit(1)
	}
}
