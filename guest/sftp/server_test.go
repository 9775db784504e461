package sftp

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// conversation sends packets and takes the answers apart.
type conversation struct {
	t       *testing.T
	input   bytes.Buffer
	answers [][]byte
}

func begin(t *testing.T) *conversation {
	c := &conversation{t: t}
	c.say(typeInit, packet(nil).uint32(3))
	return c
}

func (c *conversation) say(kind byte, body packet) {
	_ = append(newPacket(kind), body...).send(&c.input)
}

// run serves all that was said, and gives the answers after the greeting.
func (c *conversation) run() ([][]byte, error) {
	var output bytes.Buffer
	err := Serve(&c.input, &output)
	for output.Len() >= 4 {
		size := int(binary.BigEndian.Uint32(output.Next(4)))
		c.answers = append(c.answers, append([]byte(nil), output.Next(size)...))
	}
	if len(c.answers) > 0 {
		return c.answers[1:], err
	}
	return nil, err
}

func code(t *testing.T, answer []byte) uint32 {
	t.Helper()
	if answer[0] != typeStatus {
		t.Fatalf("no status: %v", answer)
	}
	return binary.BigEndian.Uint32(answer[5:])
}

func id(number uint32) packet { return packet(nil).uint32(number) }

func TestAFileIsWrittenAndReadAtOffsets(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	c := begin(t)
	c.say(typeOpen, id(1).string(path).uint32(openRead|openWrite|openCreate|openExclude).uint32(hasPermissions).uint32(0o640))
	c.say(typeWrite, id(2).string("1").uint64(3).string("def"))
	c.say(typeWrite, id(3).string("1").uint64(0).string("abc"))
	c.say(typeRead, id(4).string("1").uint64(1).uint32(3))
	c.say(typeRead, id(5).string("1").uint64(6).uint32(3))
	c.say(typeFsetstat, id(6).string("1").uint32(hasSize|hasPermissions|hasTimes).uint64(2).uint32(0o4600).uint32(5).uint32(7))
	c.say(typeClose, id(7).string("1"))
	c.say(typeRead, id(8).string("1").uint64(0).uint32(1))
	answers, err := c.run()
	if err != nil || len(answers) != 8 {
		t.Fatal(err, len(answers))
	}
	if string(answers[3]) != string(newPacket(typeData).uint32(4).string("bcd")[4:]) {
		t.Errorf("read: %q", answers[3])
	}
	for at, wanted := range map[int]uint32{1: statusOK, 2: statusOK, 4: statusEOF, 5: statusOK, 6: statusOK, 7: statusFailure} {
		if got := code(t, answers[at]); got != wanted {
			t.Errorf("answer %d: %d, not %d", at, got, wanted)
		}
	}
	information, err := os.Stat(path)
	if err != nil || information.Size() != 2 || information.Mode().Perm() != 0o600 || information.Mode()&os.ModeSetuid == 0 || information.ModTime().Unix() != 7 {
		t.Error(information, err)
	}
}

func TestADirectoryIsListedWhole(t *testing.T) {
	folder := t.TempDir()
	for number := 0; number < 2*listedAtOnce; number++ {
		if err := os.WriteFile(filepath.Join(folder, strings.Repeat("n", 1+number%200)+string(rune('a'+number/200))), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c := begin(t)
	c.say(typeOpendir, id(1).string(folder))
	for number := uint32(2); number < 6; number++ {
		c.say(typeReaddir, id(number).string("1"))
	}
	answers, err := c.run()
	if err != nil {
		t.Fatal(err)
	}
	listed := uint32(0)
	for _, answer := range answers[1:4] {
		if answer[0] != typeName {
			t.Fatalf("%v", answer[:16])
		}
		listed += binary.BigEndian.Uint32(answer[5:])
	}
	if listed != 2*listedAtOnce+2 || code(t, answers[4]) != statusEOF {
		t.Error(listed)
	}
}

func TestNamesAreMadeChangedAndRemoved(t *testing.T) {
	folder := t.TempDir()
	at := func(name string) string { return filepath.Join(folder, name) }
	if err := os.WriteFile(at("one"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := begin(t)
	c.say(typeMkdir, id(1).string(at("d")).uint32(0))
	c.say(typeSymlink, id(2).string("one").string(at("link")))
	c.say(typeRename, id(3).string(at("one")).string(at("d")))
	c.say(typeRename, id(4).string(at("one")).string(at("two")))
	c.say(typeReadlink, id(5).string(at("link")))
	c.say(typeStat, id(6).string(at("link")))
	c.say(typeLstat, id(7).string(at("link")))
	c.say(typeRmdir, id(8).string(at("two")))
	c.say(typeRemove, id(9).string(at("d")))
	c.say(typeRmdir, id(10).string(at("d")))
	c.say(typeExtended, id(11).string("posix-rename@openssh.com").string(at("two")).string(at("link")))
	c.say(typeExtended, id(12).string("nothing@example.com"))
	c.say(99, id(13))
	answers, err := c.run()
	if err != nil || len(answers) != 13 {
		t.Fatal(err, len(answers))
	}
	if answers[4][0] != typeName || answers[6][0] != typeAttrs {
		t.Error(answers[4], answers[6])
	}
	for index, wanted := range map[int]uint32{
		0: statusOK, 1: statusOK, 2: statusFailure, 3: statusOK, 5: statusNoFile, 7: statusFailure, 8: statusFailure, 9: statusOK, 10: statusOK,
		11: statusUnsupported, 12: statusUnsupported,
	} {
		if got := code(t, answers[index]); got != wanted {
			t.Errorf("answer %d: %d, not %d", index, got, wanted)
		}
	}
	if content, err := os.ReadFile(at("link")); err != nil || string(content) != "x" {
		t.Error(content, err)
	}
}

func TestABrokenClientIsAnsweredOrLeft(t *testing.T) {
	for name, said := range map[string][]byte{
		"no greeting":     newPacket(typeStat).uint32(1).string("/"),
		"an endless one":  packet{0xff, 0xff, 0xff, 0xff, typeInit},
		"an empty one":    packet{0, 0, 0, 0},
		"greets again":    append(sent(typeInit, id(3)), sent(typeInit, id(3))...),
		"without number":  append(sent(typeInit, id(3)), sent(typeStat, packet{0, 1})...),
		"ends in between": append(sent(typeInit, id(3)), 0, 0, 0, 9, 1),
	} {
		if name == "no greeting" {
			said = sent(typeStat, id(1).string("/"))
		}
		if err := Serve(bytes.NewReader(said), io.Discard); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	c := begin(t)
	c.say(typeOpen, id(1).uint32(0xffff_ff00))
	c.say(typeSetstat, id(2).string("/nowhere").uint32(hasExtended).uint32(0xffff_ffff))
	c.say(typeRead, id(3).string("7"))
	answers, err := c.run()
	if err != nil || len(answers) != 3 {
		t.Fatal(err, len(answers))
	}
	for _, answer := range answers {
		if got := code(t, answer); got != statusBad {
			t.Error(got)
		}
	}
}

func TestHandlesHaveAnEnd(t *testing.T) {
	c := begin(t)
	for number := uint32(0); number <= maxHandles; number++ {
		c.say(typeOpendir, id(number).string("/"))
	}
	answers, err := c.run()
	if err != nil || answers[maxHandles-1][0] != typeHandle || code(t, answers[maxHandles]) != statusFailure {
		t.Error(err)
	}
}

func TestLettersAreThoseOfLs(t *testing.T) {
	for mode, shown := range map[uint32]string{0o100644: "-rw-r--r--", 0o041777: "drwxrwxrwt", 0o104711: "-rws--x--x", 0o102644: "-rw-r-Sr--", 0o120777: "lrwxrwxrwx"} {
		if got := letters(mode); got != shown {
			t.Errorf("%o: %s, not %s", mode, got, shown)
		}
	}
}

func sent(kind byte, body packet) []byte {
	var output bytes.Buffer
	_ = append(newPacket(kind), body...).send(&output)
	return output.Bytes()
}
