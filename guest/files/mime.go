package files

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unicode/utf8"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
)

const sniffBytes = 4 << 10

// byName covers what agents make; the guest's own tables are not asked, they are the guest's to change.
var byName = map[string]string{
	".txt": "text/plain", ".log": "text/plain", ".md": "text/markdown", ".csv": "text/csv", ".tsv": "text/tab-separated-values",
	".html": "text/html", ".htm": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript",
	".json": "application/json", ".xml": "application/xml", ".yaml": "application/yaml", ".yml": "application/yaml",
	".toml": "application/toml", ".py": "text/x-python", ".sh": "text/x-shellscript", ".c": "text/x-c", ".h": "text/x-c",
	".ts": "text/plain", ".go": "text/plain", ".rs": "text/plain", ".ipynb": "application/x-ipynb+json",
	".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp",
	".svg": "image/svg+xml", ".bmp": "image/bmp", ".ico": "image/vnd.microsoft.icon", ".tif": "image/tiff", ".tiff": "image/tiff",
	".pdf": "application/pdf", ".zip": "application/zip", ".gz": "application/gzip", ".tar": "application/x-tar",
	".xz": "application/x-xz", ".bz2": "application/x-bzip2", ".zst": "application/zstd", ".wasm": "application/wasm",
	".mp3": "audio/mpeg", ".wav": "audio/wav", ".ogg": "audio/ogg", ".mp4": "video/mp4", ".webm": "video/webm",
	".docx":   "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
	".xlsx":   "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
	".pptx":   "application/vnd.openxmlformats-officedocument.presentationml.presentation",
	".sqlite": "application/vnd.sqlite3", ".db": "application/octet-stream", ".parquet": "application/vnd.apache.parquet",
	".woff2": "font/woff2", ".ttf": "font/ttf", ".pyc": "application/x-python-code",
}

var byMagic = []struct {
	prefix string
	mime   string
}{
	{"\x89PNG\r\n\x1a\n", "image/png"}, {"\xff\xd8\xff", "image/jpeg"}, {"GIF8", "image/gif"}, {"%PDF-", "application/pdf"},
	{"PK\x03\x04", "application/zip"}, {"\x1f\x8b", "application/gzip"}, {"\xfd7zXZ\x00", "application/x-xz"},
	{"BZh", "application/x-bzip2"}, {"\x28\xb5\x2f\xfd", "application/zstd"}, {"\x7fELF", "application/x-executable"},
	{"SQLite format 3\x00", "application/vnd.sqlite3"}, {"OggS", "audio/ogg"}, {"ID3", "audio/mpeg"},
	{"\x00asm", "application/wasm"}, {"BM", "image/bmp"}, {"#!", "text/x-script"}, {"<?xml", "application/xml"},
	{"II*\x00", "image/tiff"}, {"MM\x00*", "image/tiff"}, {"\x1a\x45\xdf\xa3", "video/webm"},
}

// mimeOf goes by name, else by content.
func mimeOf(path string, file *os.File) string {
	if mime, ok := byName[strings.ToLower(filepath.Ext(path))]; ok {
		return mime
	}
	head := make([]byte, sniffBytes)
	count, err := syscall.Pread(int(file.Fd()), head, 0)
	if err != nil {
		count = 0
	}
	return sniff(head[:count])
}

// sniff tells the type of content by its first bytes.
func sniff(head []byte) string {
	for _, known := range byMagic {
		if bytes.HasPrefix(head, []byte(known.prefix)) {
			return known.mime
		}
	}
	switch {
	case len(head) >= 12 && string(head[:4]) == "RIFF" && string(head[8:12]) == "WEBP":
		return "image/webp"
	case len(head) >= 12 && string(head[:4]) == "RIFF" && string(head[8:12]) == "WAVE":
		return "audio/wav"
	case len(head) >= 8 && string(head[4:8]) == "ftyp":
		return "video/mp4"
	case len(head) > 262 && string(head[257:262]) == "ustar":
		return "application/x-tar"
	}
	trimmed := bytes.ToLower(bytes.TrimLeft(head, " \t\r\n"))
	for _, start := range []string{"<!doctype html", "<html"} {
		if bytes.HasPrefix(trimmed, []byte(start)) {
			return "text/html"
		}
	}
	if isText(head) {
		return "text/plain"
	}
	return "application/octet-stream"
}

func isText(head []byte) bool {
	for len(head) > 0 {
		letter, size := utf8.DecodeRune(head)
		if letter == utf8.RuneError && size == 1 {
			// The last character may have been cut.
			return len(head) < utf8.UTFMax && !utf8.FullRune(head)
		}
		if letter < ' ' && !strings.ContainsRune("\t\n\r\f\b\x1b", letter) {
			return false
		}
		head = head[size:]
	}
	return true
}

const mimePaths = 1000

// Mime serves the mime verb.
func (s *Store) Mime(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Paths    []string `json:"paths"`
		PathsB64 []string `json:"paths_b64"`
	}{}
	request.PathB64 = "Lw==" // the verb has no path of its own
	if err := s.Resolve(open, &request, &request.Location); err != nil {
		stream.Fail(err)
		return
	}
	if len(request.Paths)+len(request.PathsB64) > mimePaths {
		stream.Fail(link.Errorf("bad_request", "mime: more than %d paths", mimePaths))
		return
	}
	result := struct {
		Types []*string `json:"types"`
	}{Types: []*string{}}
	err := account.As(request.Account, func() error {
		for _, path := range request.Paths {
			result.Types = append(result.Types, sniffPath(decodePath(path, "")))
		}
		for _, path := range request.PathsB64 {
			result.Types = append(result.Types, sniffPath(decodePath("", path)))
		}
		return nil
	})
	answer(stream, err, result)
}

func sniffPath(path string, err error) *string {
	if err != nil {
		return nil
	}
	file, _, err := openRegular(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	head := make([]byte, sniffBytes)
	count, err := syscall.Pread(int(file.Fd()), head, 0)
	if err != nil {
		return nil
	}
	mime := sniff(head[:count])
	return &mime
}
