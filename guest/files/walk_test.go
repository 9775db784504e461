package files

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

// However small the pages and however few names are held, a walk meets everything once and in one order.
func TestAWalkInSmallPages(t *testing.T) {
	dir := t.TempDir()
	for index := 0; index < 60; index++ {
		folder := fmt.Sprintf("%s/%d/%d", dir, index%7, index%3)
		_ = os.MkdirAll(folder, 0o755)
		_ = os.WriteFile(fmt.Sprintf("%s/%d.txt", folder, index), nil, 0o600)
	}
	walk := func(left, held int) string {
		var met []string
		after := ""
		for {
			w := newWalker(dir, after)
			w.left, w.held = left, held
			w.enter = func(string) bool { return true }
			w.visit = func(relative string, _ *syscall.Stat_t) (bool, error) {
				met = append(met, relative)
				return true, nil
			}
			done, err := w.run()
			if err != nil {
				t.Fatal(err)
			}
			if done {
				return strings.Join(met, " ")
			}
			after = w.last
		}
	}
	whole := walk(1_000, 1_000)
	if count := len(strings.Fields(whole)); count != 60+7+21 {
		t.Fatal(count, whole)
	}
	for _, left := range []int{1, 2, 5, 50} {
		for _, held := range []int{1, 2, 100} {
			if walk(left, held) != whole {
				t.Error("pages of", left, "holding", held, "met something else")
			}
		}
	}
}
