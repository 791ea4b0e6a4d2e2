//! The frames of a WebSocket's client (RFC 6455 section 5.2), parsed for two events: a message is too large, which the
//! decoder only notices once it has received all of it; and the client has closed.

/// The largest message of a client, in all its fragments, in bytes.
pub const MESSAGE_MAX: u64 = 64 << 10;

/// The opcode of a close frame. Those of all control frames have this bit.
const CLOSE: u8 = 8;

/// Parses a client's frames, beginning with the first one.
#[derive(Debug, Default)]
pub struct Frames {
    /// The received part of a frame's head.
    head: Vec<u8>,
    /// The missing bytes of a frame's payload.
    payload: u64,
    /// The size of the message so far.
    message: u64,
    is_too_large: bool,
    /// The payload is that of a close frame.
    is_close: bool,
    is_closed: bool,
}

struct Head {
    opcode: u8,
    payload: u64,
}

impl Frames {
    /// Copies `input` to `out`, except for a message that is too large, and everything after it.
    pub fn filter(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() && !self.is_closed {
            let length = match self.payload {
                0 => 1,
                payload => usize::try_from(payload).unwrap_or(usize::MAX).min(input.len()),
            };
            let (part, rest) = input.split_at(length);
            input = rest;
            if self.payload == 0 {
                self.head.extend_from_slice(part);
                if let Some(head) = Head::parse(&self.head) {
                    self.begin(&head, out);
                }
            } else {
                self.payload -= length as u64;
                self.hand_on(part, out);
                self.is_closed = self.is_close && self.payload == 0;
            }
        }
    }

    /// Whether there was a message that is too large.
    pub fn is_too_large(&self) -> bool {
        self.is_too_large
    }

    /// Whether the client has sent a close frame. It sends nothing more.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    fn begin(&mut self, &Head { opcode, payload }: &Head, out: &mut Vec<u8>) {
        let is_control = opcode & CLOSE != 0;
        if !is_control {
            let before = if opcode == 0 { self.message } else { 0 };
            self.message = before.saturating_add(payload);
        }
        self.is_too_large |= payload > MESSAGE_MAX || (!is_control && self.message > MESSAGE_MAX);
        let head = std::mem::take(&mut self.head);
        self.hand_on(&head, out);
        (self.payload, self.is_close) = (payload, opcode == CLOSE);
        self.is_closed = self.is_close && payload == 0;
    }

    fn hand_on(&self, part: &[u8], out: &mut Vec<u8>) {
        if !self.is_too_large {
            out.extend_from_slice(part);
        }
    }
}

impl Head {
    /// None if the head is incomplete.
    fn parse(head: &[u8]) -> Option<Self> {
        let [first, second] = *head.first_chunk()?;
        let mask = if second & 0x80 == 0 { 0 } else { 4 };
        let (payload, length) = match second & 0x7f {
            126 => (u16::from_be_bytes(*head.get(2..)?.first_chunk()?).into(), 4),
            127 => (u64::from_be_bytes(*head.get(2..)?.first_chunk()?), 10),
            short => (short.into(), 2),
        };
        (head.len() == length + mask).then_some(Self { opcode: first & 0x0f, payload })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A frame of a client; its payload is all zeros, and so is its mask.
    fn frame(first: u8, payload: usize) -> Vec<u8> {
        let mut frame = vec![first];
        match payload {
            0..126 => frame.push(0x80 | u8::try_from(payload).unwrap()),
            126..0x1_0000 => frame.extend([&[0xfe], &u16::try_from(payload).unwrap().to_be_bytes()[..]].concat()),
            _ => frame.extend([&[0xff], &u64::try_from(payload).unwrap().to_be_bytes()[..]].concat()),
        }
        frame.resize(frame.len() + 4 + payload, 0);
        frame
    }

    /// The output for frames that are received in pieces of this size, and the final state.
    fn filtered(input: &[u8], piece: usize) -> (Vec<u8>, Frames) {
        let (mut frames, mut out) = (Frames::default(), Vec::new());
        for piece in input.chunks(piece) {
            frames.filter(piece, &mut out);
        }
        (out, frames)
    }

    #[test]
    fn a_message_is_too_large_from_its_head_on_and_the_close_after_it_is_seen() {
        let max = usize::try_from(MESSAGE_MAX).unwrap();
        let small = [frame(0x81, max), frame(0x89, 4), frame(0x82, 300), frame(0x8a, 0)].concat();
        assert_eq!(filtered(&small, 1000).0, small);
        let fragments = [frame(0x01, max - 10), frame(0x89, 20), frame(0x00, 5), frame(0x80, 5)].concat();
        assert_eq!(filtered(&fragments, 7).0, fragments);
        for large in [
            frame(0x82, max + 1),
            frame(0x89, max + 1),
            [frame(0x01, max), frame(0x80, 1)].concat(),
            [&[0x81, 0xff], &u64::MAX.to_be_bytes()[..], &[0; 4]].concat(),
        ] {
            let (out, frames) = filtered(&[&small[..], &large[..]].concat(), 4096);
            assert!(frames.is_too_large() && !frames.is_closed());
            assert!(out.len() < small.len() + max + 20);
        }
        let (out, frames) =
            filtered(&[frame(0x81, max + 1), frame(0x81, 5), frame(0x88, 2), frame(0x81, 5)].concat(), 99);
        assert!(frames.is_too_large() && frames.is_closed() && out.is_empty());
    }

    #[test]
    fn nothing_counts_after_a_close() {
        for close in [frame(0x88, 0), frame(0x88, 2), frame(0x88, 125)] {
            let (out, frames) = filtered(&[frame(0x81, 5), close.clone(), frame(0x81, 9)].concat(), 3);
            assert_eq!(out, [frame(0x81, 5), close].concat());
            assert!(frames.is_closed() && !frames.is_too_large());
        }
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            parts in prop::collection::vec((prop::sample::select(vec![0x81_u8, 0x01, 0x80, 0x89]), 0_usize..70_000), 0..4),
            piece in 1_usize..5000,
        ) {
            let input = parts.iter().flat_map(|(first, payload)| frame(*first, *payload)).collect::<Vec<_>>();
            let ((whole, at_once), (pieces, frames)) = (filtered(&input, usize::MAX), filtered(&input, piece));
            prop_assert!(whole == pieces && at_once.is_too_large() == frames.is_too_large());
            prop_assert!(frames.is_too_large() || pieces == input);
        }
    }
}
