package boot

import (
	"os"
	"path/filepath"
	"testing"
)

func TestTheFoldersOfTheImageAreThereWithTheirModesAndNoFiles(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	for _, name := range []string{"screen", "lock/deep"} {
		if err := os.MkdirAll(filepath.Join(from, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(from, "screen"), 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(from, "lock/old.pid"), []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc", filepath.Join(from, "link")); err != nil {
		t.Fatal(err)
	}
	if err := sameFolders(from, to); err != nil {
		t.Fatal(err)
	}
	found, err := os.Stat(filepath.Join(to, "screen"))
	if err != nil || found.Mode() != os.ModeDir|os.ModeSticky|0o777 {
		t.Fatalf("screen: %v, %v", found, err)
	}
	if _, err := os.Stat(filepath.Join(to, "lock/deep")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"lock/old.pid", "link"} {
		if _, err := os.Lstat(filepath.Join(to, name)); !os.IsNotExist(err) {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

func TestAnImageWithoutARunOfItsOwnHasNoFolders(t *testing.T) {
	to := t.TempDir()
	link := filepath.Join(t.TempDir(), "run")
	if err := os.Symlink("/etc", link); err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{"/nowhere", link} {
		if err := sameFolders(from, to); err != nil {
			t.Fatal(err)
		}
	}
	if entries, err := os.ReadDir(to); err != nil || len(entries) != 0 {
		t.Fatalf("%v, %v", entries, err)
	}
}
