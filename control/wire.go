package control

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// ProtocolVersion is docs/format/control.md's.
const ProtocolVersion = 1

const (
	maxMessage = 16 << 20
	helloFDs   = 3
)

// Refusal is an error that the other side is told of: a code of docs/format/control.md, and what to do.
type Refusal struct {
	Code    string
	Message string
}

func (r *Refusal) Error() string { return r.Code + ": " + r.Message }

func refuse(code, format string, args ...any) error {
	return &Refusal{code, fmt.Sprintf(format, args...)}
}

// readMessage reads a frame. Memory grows with what comes, not with what the length claims.
func readMessage(in io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return nil, err
	}
	return readBody(in, head)
}

func readBody(in io.Reader, head [4]byte) ([]byte, error) {
	n := binary.LittleEndian.Uint32(head[:])
	if n > maxMessage {
		return nil, refuse("protocol", "a message of %d bytes: at most %d are taken; send requests in several messages", n, maxMessage)
	}
	var body bytes.Buffer
	got, err := io.CopyN(&body, in, int64(n))
	if err != nil {
		return nil, fmt.Errorf("control: a message ends after %d of %d bytes: %w", got, n, io.ErrUnexpectedEOF)
	}
	return body.Bytes(), nil
}

// readHello reads the first message and the descriptors that came with it, which are the caller's, also on an error.
func readHello(conn *net.UnixConn) (body []byte, fds []int, err error) {
	var head [4]byte
	oob := make([]byte, unix.CmsgSpace(helloFDs*4))
	for n := 0; n < len(head); {
		got, oobn, _, _, err := conn.ReadMsgUnix(head[n:], oob)
		if oobn > 0 {
			more, err := descriptors(oob[:oobn])
			fds = append(fds, more...)
			if err != nil {
				return nil, fds, err
			}
		}
		if err == nil && got == 0 {
			err = io.EOF
		}
		if err != nil {
			return nil, fds, err
		}
		n += got
	}
	body, err = readBody(conn, head)
	return body, fds, err
}

func descriptors(oob []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control: descriptors of hello: %w", err)
	}
	for _, m := range messages {
		more, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, fmt.Errorf("control: descriptors of hello: %w", err)
		}
		fds = append(fds, more...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func encodeMessage(m any) ([]byte, error) {
	body, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("control: encode a message: %w", err)
	}
	if len(body) > maxMessage {
		return nil, fmt.Errorf("control: a message of %d bytes exceeds %d", len(body), maxMessage)
	}
	return append(binary.LittleEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body))), body...), nil
}

// decodeStrict decodes one JSON object and nothing else, refusing fields that it does not know.
func decodeStrict(body []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return refuse("protocol", "%v in %s", err, excerpt(body))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return refuse("protocol", "more than one JSON value in a message")
	}
	return nil
}

func excerpt(body []byte) string {
	if len(body) > 200 {
		return fmt.Sprintf("%q...", body[:200])
	}
	return fmt.Sprintf("%q", body)
}

func messageType(body []byte) (string, error) {
	var m struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return "", refuse("protocol", "a message is a JSON object with a type: %v in %s", err, excerpt(body))
	}
	return m.Type, nil
}
