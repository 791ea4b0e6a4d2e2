//! The messages to a member, no faster than its connection takes them: unread messages wait in its queue, where members
//! share the texts, and hardly in the HTTP server, where each connection has a copy.

use actix_ws::{Closed, Item, Session};
use bytestring::ByteString;
use wgkex_common::http::connections::UpgradedConnection;

/// The most unsent bytes of the connection when further ones are added. With the longest part of an answer they are no
/// more than each connection may hold.
const UNSENT_BYTES_MAX: u64 = 2 << 10;

/// Sends messages to a member. Pings and close frames bypass it.
pub struct MemberWriter<'a> {
    session: Session,
    connection: &'a UpgradedConnection,
    /// The connection's count of sent bytes when all messages so far are sent.
    queued_bytes: u64,
}

impl<'a> MemberWriter<'a> {
    pub fn new(session: Session, connection: &'a UpgradedConnection) -> Self {
        Self { session, connection, queued_bytes: 0 }
    }

    pub async fn text(&mut self, text: ByteString) -> Result<(), Closed> {
        self.wait_for_room(text.len()).await;
        self.session.text(text).await
    }

    /// A text whose parts are made when there is room; several are a frame each (RFC 6455 section 5.4).
    pub async fn text_in_parts(&mut self, parts: impl Iterator<Item = String>) -> Result<(), Closed> {
        let mut parts = parts.peekable();
        let Some(first) = parts.next() else { return Ok(()) };
        if parts.peek().is_none() {
            return self.text(first.into()).await;
        }
        self.frame(first.len(), Item::FirstText(first.into())).await?;
        while let Some(part) = parts.next() {
            let (length, part) = (part.len(), part.into());
            let item = if parts.peek().is_some() { Item::Continue(part) } else { Item::Last(part) };
            self.frame(length, item).await?;
        }
        Ok(())
    }

    async fn frame(&mut self, length: usize, item: Item) -> Result<(), Closed> {
        self.wait_for_room(length).await;
        self.session.continuation(item).await
    }

    async fn wait_for_room(&mut self, length: usize) {
        self.connection.has_sent(self.queued_bytes.saturating_sub(UNSENT_BYTES_MAX)).await;
        self.queued_bytes = self.queued_bytes.max(self.connection.sent()) + length as u64;
    }
}
