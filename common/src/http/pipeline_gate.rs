//! A connection's stream as the HTTP server reads it: pipelined requests are passed on one after the other, and none
//! before the response to the previous one is sent. The memory held for the client is counted. After an upgrade the
//! client's frames are passed on as they are received, and the stream ends when both sides have closed.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connections::{ConnectionActivity, ConnectionGuard};
use super::frames::Frames;

/// The size of a read, and so the most bytes that wait here.
const READ_BYTES: usize = 4096;
/// The most heads that are passed on before the server decodes them. Two, so that a request and its body are passed on
/// at once.
const HEADS_AHEAD_MAX: usize = 2;
/// Memory that a connection may hold without being counted: the usual amount.
const UNCOUNTED_BYTES: usize = 8 << 10;
/// The largest head that the server accepts; it keeps no more than that for a client.
const HEAD_MAX: usize = 128 << 10;

/// The stream of a connection that has a place in the table.
pub struct PipelineGate<S> {
    stream: S,
    place: ConnectionGuard,
    /// Bytes that were read and not passed on.
    unprocessed: Vec<u8>,
    ends: HeadEndFinder,
    /// Heads that were passed on since the server last had to wait, which is when it decodes them.
    heads_passed: usize,
    /// Bytes passed on since the last head ended; they may be the beginning of a head, which the server keeps.
    input: usize,
    /// The maximum of `input` so far, since the server does not shrink its buffer.
    most_input: usize,
    /// Bytes of the response that the client has not read.
    unread: usize,
    /// The maximum of `unread` so far: the server does not shrink its buffer until the whole response is sent.
    most_unread: usize,
    is_flushing: bool,
    /// The parser of frames, after an upgrade.
    frames: Option<Box<Frames>>,
    upgrade: UpgradeHeader,
}

impl<S> PipelineGate<S> {
    pub(super) fn new(stream: S, place: ConnectionGuard) -> Self {
        Self {
            stream,
            place,
            unprocessed: Vec::new(),
            ends: HeadEndFinder::default(),
            heads_passed: 0,
            input: 0,
            most_input: 0,
            unread: 0,
            most_unread: 0,
            is_flushing: false,
            frames: None,
            upgrade: UpgradeHeader::default(),
        }
    }

    pub(super) fn activity(&self) -> Arc<ConnectionActivity> {
        self.place.activity().clone()
    }

    /// Whether the next request has to wait: one is being served, or its response is not sent.
    fn must_wait(&self) -> bool {
        self.unread > 0 || self.is_flushing || self.place.activity().is_busy()
    }

    /// Passes on bytes that may be decoded now. Bytes after a head with an upgrade wait: they may be frames.
    fn hand_on(&mut self, buf: &mut ReadBuf<'_>) {
        let most = self.unprocessed.len().min(buf.remaining());
        let mut length = 0;
        while length < most && self.heads_passed < HEADS_AHEAD_MAX {
            let byte = self.unprocessed[length];
            length += 1;
            self.input += 1;
            let is_upgrade = self.upgrade.is_found_with(byte);
            if self.ends.is_end(byte) {
                self.heads_passed = if is_upgrade { HEADS_AHEAD_MAX } else { self.heads_passed + 1 };
                self.input = 0;
                self.upgrade = UpgradeHeader::default();
            }
        }
        self.put(length, buf);
        self.most_input = self.most_input.max(self.input.min(HEAD_MAX));
        self.count();
    }

    /// Passes on so many of the waiting bytes.
    fn put(&mut self, length: usize, buf: &mut ReadBuf<'_>) {
        buf.put_slice(&self.unprocessed[..length]);
        if length == self.unprocessed.len() {
            self.unprocessed = Vec::new();
        } else {
            self.unprocessed.drain(..length);
        }
    }

    fn count(&self) {
        self.place.set_buffered(
            self.most_input.saturating_sub(UNCOUNTED_BYTES) + self.most_unread.saturating_sub(UNCOUNTED_BYTES),
        );
    }

    /// Wakes the reader of the next request if nothing else delays that. Not for frames, which do not wait for writes:
    /// waking their reader would make the connection wake itself for ever.
    fn wake(&self) {
        if !self.must_wait() && self.frames.is_none() {
            self.place.activity().wake();
        }
    }
}

impl<S: AsyncRead + Unpin> PipelineGate<S> {
    /// Reads the client's frames after an upgrade. The stream ends when both sides have closed.
    fn read_frames(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.frames.is_none() {
            let early = std::mem::take(&mut self.unprocessed);
            self.frames.get_or_insert_default().filter(&early, &mut self.unprocessed);
            self.most_input = 0;
        }
        self.place.activity().register(cx.waker());
        let frames = self.frames.get_or_insert_default();
        while self.unprocessed.is_empty() {
            if frames.is_too_large() {
                self.place.activity().set_too_large();
            }
            if frames.is_closed() {
                return if self.place.activity().is_ending() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            let mut piece = [0; READ_BYTES];
            let mut piece = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut piece))?;
            if piece.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            frames.filter(piece.filled(), &mut self.unprocessed);
        }
        self.put(self.unprocessed.len().min(buf.remaining()), buf);
        Poll::Ready(Ok(()))
    }

    fn read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.heads_passed >= HEADS_AHEAD_MAX {
            // The server has to decode them first.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.unprocessed.is_empty() {
            let mut piece = [0; READ_BYTES];
            let mut piece = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut piece))?;
            if piece.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.unprocessed.extend_from_slice(piece.filled());
        }
        if self.must_wait() {
            self.place.activity().register(cx.waker());
            return Poll::Pending;
        }
        self.hand_on(buf);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PipelineGate<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.place.activity().is_upgraded() {
            return this.read_frames(cx, buf);
        }
        let read = this.read(cx, buf);
        if read.is_pending() {
            this.heads_passed = 0;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PipelineGate<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.unread = match &written {
            Poll::Ready(Ok(length)) => buf.len() - length,
            Poll::Ready(Err(_)) => 0,
            Poll::Pending => buf.len(),
        };
        this.most_unread = if this.unread == 0 { 0 } else { this.most_unread.max(buf.len()) };
        if let Poll::Ready(Ok(length)) = &written
            && this.place.activity().is_upgraded()
        {
            this.place.activity().add_sent(*length);
        }
        this.count();
        this.wake();
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.stream).poll_flush(cx);
        this.is_flushing = flushed.is_pending();
        this.wake();
        flushed
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// Finds the ends of heads: a line end and an empty line. A body may contain the same bytes.
#[derive(Default)]
enum HeadEndFinder {
    #[default]
    Within,
    /// After the end of a line.
    Line,
    /// After that and a carriage return.
    Return,
}

impl HeadEndFinder {
    fn is_end(&mut self, byte: u8) -> bool {
        let (next, is_end) = match (&self, byte) {
            (Self::Line | Self::Return, b'\n') => (Self::Within, true),
            (Self::Within, b'\n') => (Self::Line, false),
            (Self::Line, b'\r') => (Self::Return, false),
            (Self::Within | Self::Line | Self::Return, _) => (Self::Within, false),
        };
        *self = next;
        is_end
    }
}

/// Finds the word "upgrade" in a head. A body may contain it without a meaning.
#[derive(Default)]
struct UpgradeHeader {
    /// The number of matched letters; remains complete after a match.
    letters: usize,
}

impl UpgradeHeader {
    const WORD: &[u8] = b"upgrade";

    /// Whether the word is found, including this byte.
    fn is_found_with(&mut self, byte: u8) -> bool {
        if let Some(expected) = Self::WORD.get(self.letters) {
            let byte = byte.to_ascii_lowercase();
            self.letters = if byte == *expected { self.letters + 1 } else { usize::from(byte == Self::WORD[0]) };
        }
        self.letters == Self::WORD.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use proptest::prelude::*;
    use tokio::io::{DuplexStream, duplex};

    use super::super::connections::Connections;
    use super::*;

    const GET: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

    fn pipeline_gate(room: usize) -> (PipelineGate<DuplexStream>, DuplexStream) {
        let (server, client) = duplex(room);
        (PipelineGate::new(server, Connections::for_few_clients().guard()), client)
    }

    /// The received bytes, empty at the end; none if there is nothing now.
    fn read(stream: &mut (impl AsyncRead + Unpin), room: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; room];
        let mut buf = ReadBuf::new(&mut bytes);
        match Pin::new(stream).poll_read(&mut Context::from_waker(Waker::noop()), &mut buf) {
            Poll::Ready(read) => read.map(|()| buf.filled().to_vec()).ok(),
            Poll::Pending => None,
        }
    }

    /// The number of written bytes; none if nothing can be written now.
    fn write(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Option<usize> {
        match Pin::new(stream).poll_write(&mut Context::from_waker(Waker::noop()), bytes) {
            Poll::Ready(written) => written.ok(),
            Poll::Pending => None,
        }
    }

    #[test]
    fn requests_come_two_at_most_before_they_are_decoded_and_none_while_one_is_under_way() {
        let (mut server, mut client) = pipeline_gate(256);
        let (activity, two) = (server.activity(), Some(GET.repeat(2)));
        assert_eq!(write(&mut client, &GET.repeat(7)), Some(GET.len() * 7));
        assert_eq!(read(&mut server, 8192), two);
        assert_eq!(read(&mut server, 8192), None, "they are decoded first");
        let busy = activity.begin();
        assert_eq!(read(&mut server, 8192), None);
        activity.wait_for_client(busy.since());
        assert_eq!(read(&mut server, 8192), two, "it waits for its body");
        assert_eq!(read(&mut server, 8192), None);
        activity.set_busy();
        assert_eq!(read(&mut server, 8192), None);
        drop(busy);
        assert_eq!(write(&mut server, &[0; 300]), Some(256));
        assert_eq!(read(&mut server, 8192), None, "its answer is not out");
        assert_eq!(write(&mut server, &[0; 44]), None);
        assert_eq!(read(&mut server, 8192), None);
        assert_eq!(read(&mut client, 256).map(|bytes| bytes.len()), Some(256));
        assert_eq!(write(&mut server, &[0; 44]), Some(44));
        assert_eq!(read(&mut server, 8192), two);
        drop(client);
        assert_eq!(read(&mut server, 8192), None);
        assert_eq!(read(&mut server, 8192).as_deref(), Some(GET));
        assert_eq!(read(&mut server, 8192).as_deref(), Some(&b""[..]));
    }

    #[test]
    fn frames_wait_for_the_upgrade_and_come_until_both_sides_have_closed() {
        const UPGRADE: &[u8] = b"GET / HTTP/1.1\r\nUpGrade: websocket\r\n\r\n";
        // A frame that contains the bytes of ends of heads, and a close frame.
        const TEXT: &[u8] = b"\x81\x8a\0\0\0\0\r\n\r\n\r\n\r\n\r\n";
        const CLOSE: &[u8] = b"\x88\x80\0\0\0\0";
        let (mut server, mut client) = pipeline_gate(256);
        let activity = server.activity();
        assert_eq!(write(&mut client, &[UPGRADE, TEXT].concat()), Some(UPGRADE.len() + TEXT.len()));
        assert_eq!(read(&mut server, 8192).as_deref(), Some(UPGRADE));
        assert_eq!(read(&mut server, 8192), None);
        let busy = activity.begin();
        activity.upgrade();
        assert_eq!(read(&mut server, 8192).as_deref(), Some(TEXT));
        drop(busy);
        assert!(write(&mut client, &[TEXT, CLOSE, TEXT].concat()).is_some());
        assert_eq!(read(&mut server, 8192), Some([TEXT, CLOSE].concat()));
        assert_eq!(read(&mut server, 8192), None, "it is to be answered");
        activity.end();
        assert_eq!(read(&mut server, 8192).as_deref(), Some(&b""[..]));

        let (mut server, mut client) = pipeline_gate(256);
        let (activity, large) = (server.activity(), b"\x81\xff\0\0\0\0\xff\0\0\0\0\0\0\0secret");
        activity.upgrade();
        let is_too_large = || activity.poll_too_large(&Context::from_waker(Waker::noop())).is_ready();
        assert!(!is_too_large() && write(&mut client, large).is_some());
        assert_eq!(read(&mut server, 8192), None);
        assert!(is_too_large());
    }

    #[test]
    fn after_an_upgrade_a_task_that_waits_for_output_is_woken_by_it() {
        let (mut server, mut client) = pipeline_gate(256);
        assert_eq!(write(&mut server, b"HTTP/1.1 101\r\n"), Some(14));
        let activity = server.activity();
        activity.upgrade();
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let is_sent = |bytes| activity.poll_sent(bytes, &Context::from_waker(&waker)).is_ready();
        assert!(is_sent(0) && !is_sent(243));
        assert_eq!((write(&mut server, &[0; 242]), woken.count()), (Some(242), 0));
        assert_eq!((write(&mut server, &[0; 9]), activity.sent()), (None, 242));
        assert!(read(&mut client, 256).is_some());
        assert_eq!((write(&mut server, &[0; 9]), woken.count()), (Some(9), 1));
        assert!(is_sent(243));
        assert_eq!((write(&mut server, &[0; 9]), woken.count()), (Some(9), 1), "nobody waits");
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Woken {
        fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Failed when only unread bytes were counted: 120 clients of a large page held twice the limit.
    #[test]
    fn an_answer_is_counted_whole_until_all_of_it_is_sent() {
        let (mut server, mut client) = pipeline_gate(64 << 10);
        let activity = server.activity();
        let answer = vec![0; 100 << 10];
        assert_eq!(write(&mut server, &answer), Some(64 << 10));
        assert_eq!(write(&mut server, &answer[64 << 10..]), None);
        assert_eq!(activity.buffered(), (100 << 10) - UNCOUNTED_BYTES);
        assert!(read(&mut client, 64 << 10).is_some());
        assert_eq!(write(&mut server, &answer[64 << 10..]), Some(36 << 10));
        assert_eq!(activity.buffered(), 0);
    }

    /// The number of heads that the server's decoder finds in a whole text.
    fn heads(text: &[u8]) -> usize {
        let text = String::from_utf8_lossy(text).replace('\r', "");
        text.match_indices("\n\n").count()
    }

    proptest! {
        #[test]
        fn all_input_arrives_whole_and_few_heads_at_once(
            parts in prop::collection::vec(prop_oneof!["GET / HTTP/1.1\r\n", "\r\n", "\n", "[a-z:]{1,9}"], 1..200),
            room in 1usize..200,
        ) {
            let sent = parts.concat().into_bytes();
            let (mut server, mut client) = pipeline_gate(1 << 16);
            prop_assert_eq!(write(&mut client, &sent), Some(sent.len()));
            drop(client);
            let (mut came, mut at_once) = (Vec::<u8>::new(), Vec::<u8>::new());
            loop {
                match read(&mut server, room) {
                    Some(end) if end.is_empty() => break,
                    Some(part) => {
                        came.extend(&part);
                        at_once.extend(&part);
                        prop_assert!(heads(&at_once) <= HEADS_AHEAD_MAX);
                    }
                    None => at_once.clear(),
                }
            }
            prop_assert_eq!(came, sent);
        }
    }
}
