//! A request's body: its bytes, as far as they may be; and its text, in every encoding of JSON that Python's `json.loads`
//! accepts, and so the original.

use std::borrow::Cow;
use std::str;
use std::time::Duration;

use actix_web::web::{BytesMut, Payload};
use futures_util::StreamExt as _;
use tokio::time::{Instant, timeout_at};

/// The most bytes that are read of a body that is too large, so that its sender receives the answer.
const DISCARDED_BYTES_MAX: usize = 1 << 20;
/// How long the body of a request may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a body is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyError {
    /// It ended too early.
    Incomplete,
    /// It did not arrive in time.
    Slow,
    /// It is larger than it may be.
    TooLarge,
}

/// The body, of at most so many bytes, whatever its content type.
pub async fn read(mut body: Payload, most: usize) -> Result<BytesMut, BodyError> {
    let (mut taken, mut size, until) = (BytesMut::new(), 0, Instant::now() + BODY_TIMEOUT);
    loop {
        let part = match timeout_at(until, body.next()).await {
            Ok(Some(part)) => part.map_err(|_| BodyError::Incomplete)?,
            Ok(None) if size <= most => return Ok(taken),
            Err(_) if size <= most => return Err(BodyError::Slow),
            Ok(None) | Err(_) => return Err(BodyError::TooLarge),
        };
        size += part.len();
        if size <= most {
            taken.extend_from_slice(&part);
        } else if size > DISCARDED_BYTES_MAX {
            return Err(BodyError::TooLarge);
        }
    }
}

/// How the text is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Utf8,
    Utf16 { is_big: bool },
    Utf32 { is_big: bool },
}

/// The text without its byte order mark; none if the body is not text.
pub fn text(body: &[u8]) -> Option<Cow<'_, str>> {
    let (encoding, mark) = encoding(body);
    let bytes = &body[mark..];
    match encoding {
        Encoding::Utf8 => str::from_utf8(bytes).ok().map(Cow::Borrowed),
        Encoding::Utf16 { is_big } => {
            let (units, []) = bytes.as_chunks() else { return None };
            let units =
                units.iter().map(|unit| if is_big { u16::from_be_bytes(*unit) } else { u16::from_le_bytes(*unit) });
            char::decode_utf16(units).collect::<Result<_, _>>().ok().map(Cow::Owned)
        }
        Encoding::Utf32 { is_big } => {
            let (units, []) = bytes.as_chunks() else { return None };
            let units =
                units.iter().map(|unit| if is_big { u32::from_be_bytes(*unit) } else { u32::from_le_bytes(*unit) });
            units.map(char::from_u32).collect::<Option<_>>().map(Cow::Owned)
        }
    }
}

/// The encoding, and the length of its byte order mark. Without one, the zeros in the first characters show the encoding,
/// since JSON begins with ASCII.
fn encoding(body: &[u8]) -> (Encoding, usize) {
    match *body {
        [0, 0, 0xfe, 0xff, ..] => (Encoding::Utf32 { is_big: true }, 4),
        [0xff, 0xfe, 0, 0, ..] => (Encoding::Utf32 { is_big: false }, 4),
        [0xfe, 0xff, ..] => (Encoding::Utf16 { is_big: true }, 2),
        [0xff, 0xfe, ..] => (Encoding::Utf16 { is_big: false }, 2),
        [0xef, 0xbb, 0xbf, ..] => (Encoding::Utf8, 3),
        [0, 0, _, _, ..] => (Encoding::Utf32 { is_big: true }, 0),
        [0, _, _, _, ..] => (Encoding::Utf16 { is_big: true }, 0),
        [_, 0, 0, 0, ..] => (Encoding::Utf32 { is_big: false }, 0),
        [_, 0, _, _, ..] => (Encoding::Utf16 { is_big: false }, 0),
        _ => (Encoding::Utf8, 0),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_text_is_read_by_its_mark_or_by_its_zeros() {
        let json = "{\"a\": \"ü𝄞\"}";
        let marked = format!("\u{feff}{json}");
        let encode16 = |text: &str, bytes: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(bytes).collect::<Vec<_>>();
        let encode32 = |text: &str, bytes: fn(u32) -> [u8; 4]| {
            text.chars().flat_map(|char| bytes(u32::from(char))).collect::<Vec<_>>()
        };
        for text in [json, &marked] {
            for body in [
                text.as_bytes().to_vec(),
                encode16(text, u16::to_be_bytes),
                encode16(text, u16::to_le_bytes),
                encode32(text, u32::to_be_bytes),
                encode32(text, u32::to_le_bytes),
            ] {
                assert_eq!(super::text(&body).as_deref(), Some(json), "{body:?}");
            }
        }
    }

    #[test]
    fn a_body_that_is_not_text_is_rejected() {
        let bodies: [&[u8]; 5] =
            [b"{\"a\": \"\xff\"}", b"\xff\xfe{", b"\xff\xfe\0\xd8", b"\xff\xfe\0\0{\0\0", b"\0\0\xfe\xff\0\x11\0\0"];
        for body in bodies {
            assert_eq!(text(body), None, "{body:?}");
        }
        assert_eq!(text(b"").as_deref(), Some(""));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_text_or_none(body in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = text(&body);
        }
    }
}
