package ringtape

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"dmi/ring"
)

const playWait = 30 * time.Second // for room in the ring, or an answer

// Play attaches to the engine at socket as the producer that a tape was made of, and does again what it did. A tape of a producer that was
// killed ends in a hang-up, one of a producer that said bye in a bye. The ring gets a name of its own, so that an engine may be played the
// same tape twice; the session keeps its id.
func Play(ctx context.Context, tape io.Reader, socket, token string) error {
	r, err := NewReader(tape)
	if err != nil {
		return err
	}
	var name [16]byte
	rand.Read(name[:])
	header := ShapeOf(r.Header).Header(name) // laid out as this release does, not as the one that made the tape
	header.Device = r.Header.Device
	p, err := NewProducerOf(header)
	if err != nil {
		return err
	}
	defer p.Close()
	p.StartPump()
	player := &player{p: p, socket: socket, token: token}
	defer func() {
		if player.client != nil {
			player.client.Close()
		}
	}()
	for {
		f, err := r.Next()
		if err == io.EOF {
			return player.end()
		}
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = player.play(f)
		}
		if err != nil {
			return err
		}
	}
}

type player struct {
	p      *Producer
	socket string
	token  string
	hello  []byte
	client *Client
	bye    bool
}

func (x *player) play(f *Frame) error {
	switch f.Kind {
	case frameHello:
		var o map[string]any
		d := json.NewDecoder(bytes.NewReader(f.Body))
		d.UseNumber()
		if err := d.Decode(&o); err != nil {
			return fmt.Errorf("ringtape: hello: %w", err)
		}
		o["abi"] = ring.ABIVersion // the ring is laid out anew, and what frames hold is the same in every version
		o["producer"], o["token"], o["resume"] = hex.EncodeToString(x.p.Header.Producer[:]), x.token, false
		var err error
		x.hello, err = json.Marshal(o)
		return err
	case frameSites:
		for b := f.Body; len(b) > 0; b = b[ring.SiteSize:] {
			if x.p.sites >= uint64(x.p.Header.SiteCapacity) {
				return fmt.Errorf("ringtape: more than the ring's %d sites", x.p.Header.SiteCapacity)
			}
			var s ring.Site
			s.Decode(b)
			if s.NameBytes > ring.SiteNameBytes {
				return fmt.Errorf("ringtape: site.name_bytes is %d", s.NameBytes)
			}
			x.p.AddSite(s, string(s.Name[:s.NameBytes]))
		}
		return nil
	}
	if err := x.attach(); err != nil {
		return err
	}
	if f.Kind == frameRecord {
		return x.record(f)
	}
	var m struct {
		Type string `json:"type"`
	}
	if json.Unmarshal(f.Body, &m) == nil && m.Type == "bye" {
		x.bye = true // what follows on the tape was published before
		return nil
	}
	if err := x.client.SendRaw(f.Body); err != nil || m.Type != "barrier" {
		return err
	}
	_, err := x.client.Expect("durable", playWait)
	return err
}

// attach says hello once the sites that were there from the beginning are in the table.
func (x *player) attach() error {
	if x.client != nil {
		return nil
	}
	if x.hello == nil {
		return errors.New("ringtape: the tape does not begin with hello")
	}
	c, err := Dial(x.socket)
	if err != nil {
		return err
	}
	x.client = c
	if err := c.Hello(x.hello, x.p.FDs[:]...); err != nil {
		return fmt.Errorf("ringtape: say hello: %w", err)
	}
	_, err = c.Expect("welcome", playWait)
	return err
}

func (x *player) record(f *Frame) error {
	lane := x.p.Lanes[f.Lane]
	until := time.Now().Add(playWait)
	raw := f.Record
	switch raw[ring.RecordKindOffset] {
	case ring.KindOpen:
		little := binary.LittleEndian
		little.PutUint64(raw[ring.OpenRecordTableBytesOffset:], uint64(len(f.Table)))
		if len(f.Table) > 0 {
			at, err := lane.WriteTable(f.Table, until)
			if err != nil {
				return err
			}
			little.PutUint64(raw[ring.OpenRecordTableOffset:], at)
		}
	case ring.KindCapture:
		var r ring.Record
		r.Decode(raw)
		if r.Outcome != ring.OutcomeCaptured {
			break
		}
		if uint64(len(f.Payload)) != r.PayloadBytes { // it never reached the engine that recorded
			r.Outcome, r.Reason, r.Place, r.PayloadBytes = ring.OutcomeLost, ring.ReasonProducerExit, ring.PlaceNone, 0
			r.Encode(raw)
			break
		}
		at, ok := x.p.WritePayload(r.Place, f.Payload)
		if !ok && r.Place == ring.PlaceSpill && x.p.SpillToEnd() < uint64(len(f.Payload)) {
			r.Place = ring.PlaceRing // what met the end of the spill in another place
			at, ok = x.p.WritePayload(r.Place, f.Payload)
		}
		for !ok {
			if time.Now().After(until) {
				return fmt.Errorf("ringtape: lane %d: no room for %d bytes of payload", f.Lane, len(f.Payload))
			}
			time.Sleep(100 * time.Microsecond)
			at, ok = x.p.WritePayload(r.Place, f.Payload)
		}
		r.Payload = at
		r.Encode(raw)
	}
	return lane.Publish(raw, until)
}

func (x *player) end() error {
	if err := x.attach(); err != nil {
		return err
	}
	x.p.Finish()
	if !x.bye {
		return x.drained()
	}
	if err := x.client.Send(map[string]any{"type": "bye"}); err != nil {
		return fmt.Errorf("ringtape: say bye: %w", err)
	}
	_, err := x.client.Expect("bye", playWait)
	return err
}

// drained waits until the engine has taken all that was published: what it was to lose is on the tape as lost.
func (x *player) drained() error {
	until := time.Now().Add(playWait)
	for _, lane := range x.p.Lanes {
		for lane.Room() < int(x.p.Header.RecordCapacity) {
			if time.Now().After(until) {
				return fmt.Errorf("ringtape: lane %d: the engine does not take its last records", lane.index)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}
