package ringtape

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Client is the producer's end of a control socket. Its methods are for one goroutine.
type Client struct {
	Conn   *net.UnixConn
	Events []map[string]any // that came while something else was waited for
}

// Dial connects to an engine's control socket.
func Dial(path string) (*Client, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("ringtape: connect to the engine: %w", err)
	}
	return &Client{Conn: conn}, nil
}

// framed puts a message's length before it.
func framed(body []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body))), body...)
}

// Hello sends the first message, with descriptors.
func (c *Client) Hello(body []byte, fds ...int) error {
	_, _, err := c.Conn.WriteMsgUnix(framed(body), unix.UnixRights(fds...), nil)
	return err
}

// Send sends a message.
func (c *Client) Send(m any) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return c.SendRaw(body)
}

// SendRaw sends a message as it is.
func (c *Client) SendRaw(body []byte) error {
	_, err := c.Conn.Write(framed(body))
	return err
}

// Receive reads the next message.
func (c *Client) Receive(timeout time.Duration) (map[string]any, error) {
	c.Conn.SetReadDeadline(time.Now().Add(timeout))
	var head [4]byte
	if _, err := io.ReadFull(c.Conn, head[:]); err != nil {
		return nil, err
	}
	body := make([]byte, binary.LittleEndian.Uint32(head[:]))
	if _, err := io.ReadFull(c.Conn, body); err != nil {
		return nil, err
	}
	var m map[string]any
	return m, json.Unmarshal(body, &m)
}

// Expect reads on until a message of a type comes. Events are kept; an error message is an error.
func (c *Client) Expect(kind string, timeout time.Duration) (map[string]any, error) {
	for deadline := time.Now().Add(timeout); ; {
		m, err := c.Receive(time.Until(deadline))
		if err != nil {
			return nil, fmt.Errorf("ringtape: waiting for %s: %w", kind, err)
		}
		switch m["type"] {
		case kind:
			return m, nil
		case "event":
			c.Events = append(c.Events, m)
		case "error":
			return m, fmt.Errorf("ringtape: the engine says %v: %v", m["code"], m["message"])
		}
	}
}

// Close hangs up.
func (c *Client) Close() error { return c.Conn.Close() }
