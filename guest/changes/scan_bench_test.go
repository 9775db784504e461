package changes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkNothingChanged scans trees of directories of 500 files, as `make bench` makes them, on the file system of TMPDIR.
func BenchmarkNothingChanged(b *testing.B) {
	for _, files := range []int{1_000, 10_000, 100_000} {
		b.Run(fmt.Sprint(files), func(b *testing.B) {
			dir := b.TempDir()
			q := &request{Op: "baseline", Upper: filepath.Join(dir, "upper"), Baseline: filepath.Join(dir, "baseline"), Result: filepath.Join(dir, "result")}
			for n := 0; n < files; n++ {
				folder := filepath.Join(q.Upper, "home/user/many", fmt.Sprint(n/500))
				if n%500 == 0 {
					os.MkdirAll(folder, 0o755)
				}
				os.WriteFile(filepath.Join(folder, fmt.Sprint(n, ".txt")), nil, 0o644)
			}
			if _, err := perform(context.Background(), q); err != nil {
				b.Fatal(err)
			}
			q.Op = "changes"
			b.ResetTimer()
			for i := 0; i < b.N; i++ {
				if a, err := perform(context.Background(), q); err != nil || a.Total != 0 {
					b.Fatal(a, err)
				}
			}
		})
	}
}
