//! One WebSocket, from its upgrade to its end: the first message is a join, then the messages of the tenants' task are
//! sent to the member, and messages of the member only show that it is alive.

use std::cell::Cell;
use std::future::pending;
use std::io;
use std::time::Duration;

use actix_ws::{AggregatedMessage, AggregatedMessageStream, CloseReason, ProtocolError, Session};
use bytestring::ByteString;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use wgkex_common::http::connections::UpgradedConnection;

use crate::tenants::close::{CloseCause, JOIN_TIMEOUT};
use crate::tenants::member_writer::MemberWriter;
use crate::tenants::message::{Form, answer, parse_join};
use crate::tenants::metrics::{Leave, Metrics};
use crate::tenants::service::{Membership, SessionReporter, TenantsHandle};
use crate::tenants::sessions::Outgoing;
use crate::tenants::upgrade_request::UpgradeRequest;

/// How often a member is pinged. One that has not answered by the next time is lost.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// How long there may be no room for a close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A WebSocket that was just opened.
pub struct TenantSocket {
    /// Its sending half.
    pub session: Session,
    /// Its receiving half.
    pub messages: AggregatedMessageStream,
    /// The connection below.
    pub connection: UpgradedConnection,
    /// How it was opened.
    pub upgrade_request: UpgradeRequest,
    /// The handle to the tenants' task.
    pub tenants: TenantsHandle,
    /// The metrics.
    pub metrics: Metrics,
}

/// Why a WebSocket ends.
enum SocketEnd {
    /// The client closes it.
    Client(Option<CloseReason>),
    /// The connection is lost.
    Lost,
    /// The broker closes it.
    Broker(CloseCause),
}

/// The signs of life of a member.
#[derive(Default)]
struct MemberLiveness {
    /// A message was received since the last ping.
    has_received: Cell<bool>,
    probe: PingProbe,
}

/// The ping whose answer is to be reported, until that is received. Other pongs are not reported: each report goes to
/// the coordinator of all brokers.
#[derive(Default)]
struct PingProbe {
    payload: Cell<Option<[u8; 8]>>,
}

impl TenantSocket {
    /// Serves it to its end.
    pub async fn run(mut self) {
        self.metrics.sockets.inc();
        let end = match self.join().await {
            Ok(membership) => self.be_member(membership).await,
            Err(end) => {
                self.count_refused(&end);
                end
            }
        };
        self.metrics.sockets.dec();
        self.close(end).await;
    }

    async fn join(&mut self) -> Result<Membership, SocketEnd> {
        let Self { session, messages, connection, upgrade_request, tenants, .. } = self;
        let text = tokio::select! {
            text = first_text(messages, session) => text?,
            () = connection.too_large() => return Err(SocketEnd::Broker(CloseCause::TooLarge)),
            () = sleep(JOIN_TIMEOUT) => return Err(SocketEnd::Broker(CloseCause::JoinTimeout)),
            () = tenants.stopped() => return Err(SocketEnd::Broker(CloseCause::Stopping)),
        };
        let member_info =
            parse_join(&text, upgrade_request.endpoint).map_err(|error| SocketEnd::Broker(CloseCause::Join(error)))?;
        tenants.join(upgrade_request, member_info).await.map_err(SocketEnd::Broker)
    }

    async fn be_member(&mut self, membership: Membership) -> SocketEnd {
        let Membership { reporter, mut queue, mut probes, mut end } = membership;
        let (liveness, is_answered) = (MemberLiveness::default(), Cell::new(false));
        let member_writer = MemberWriter::new(self.session.clone(), &self.connection);
        let ended = tokio::select! {
            cause = &mut end => SocketEnd::Broker(cause.unwrap_or(CloseCause::Stopping)),
            ended = read(&mut self.messages, self.session.clone(), &liveness, &reporter) => ended,
            ended = write(&mut queue, member_writer, self.upgrade_request.form, || {
                is_answered.set(true);
                self.connection.pin();
            }) => ended,
            ended = watch(self.session.clone(), &liveness) => ended,
            ended = send_probes(&mut probes, self.session.clone(), &liveness.probe) => ended,
            () = self.connection.too_large() => SocketEnd::Broker(CloseCause::TooLarge),
        };
        if !is_answered.get() {
            self.count_refused(&ended);
        }
        reporter.leave(ended.leave()).await;
        ended
    }

    fn count_refused(&self, end: &SocketEnd) {
        if let SocketEnd::Broker(cause) = end {
            self.metrics.refused.with_label_values(&[cause.label()]).inc();
        }
    }

    /// The connection ends when the client has closed, too, or soon after; at once where it does not take the close frame.
    async fn close(self, end: SocketEnd) {
        let Self { session, connection, .. } = self;
        let reason = match end {
            SocketEnd::Lost => return,
            SocketEnd::Client(reason) => reason.map(|CloseReason { code, .. }| CloseReason { code, description: None }),
            SocketEnd::Broker(cause) => match cause.reason() {
                None => return connection.abort(),
                reason => reason,
            },
        };
        if timeout(CLOSE_TIMEOUT, session.close(reason)).await.is_err() {
            connection.abort();
        }
    }
}

impl PingProbe {
    /// The payload of the next ping, from a number that the member does not know.
    fn begin(&self, number: u64) -> [u8; 8] {
        let payload = number.to_be_bytes();
        self.payload.set(Some(payload));
        payload
    }

    /// Whether this is its answer, and the first one.
    fn is_answered_by(&self, pong: &[u8]) -> bool {
        let is_answer = self.payload.get().is_some_and(|payload| payload == pong);
        if is_answer {
            self.payload.set(None);
        }
        is_answer
    }
}

impl SocketEnd {
    fn leave(&self) -> Leave {
        match self {
            Self::Client(_) | Self::Lost => Leave::Closed,
            Self::Broker(CloseCause::Silent) => Leave::Silent,
            Self::Broker(_) => Leave::Refused,
        }
    }
}

/// The first message.
async fn first_text(messages: &mut AggregatedMessageStream, session: &mut Session) -> Result<ByteString, SocketEnd> {
    loop {
        match receive(messages, session).await? {
            AggregatedMessage::Text(text) => return Ok(text),
            AggregatedMessage::Binary(_) => return Err(SocketEnd::Broker(CloseCause::Binary)),
            AggregatedMessage::Ping(_) | AggregatedMessage::Pong(_) | AggregatedMessage::Close(_) => {}
        }
    }
}

/// Receives a member's messages for ever: they only show that it is alive.
async fn read(
    messages: &mut AggregatedMessageStream,
    mut session: Session,
    liveness: &MemberLiveness,
    reporter: &SessionReporter,
) -> SocketEnd {
    loop {
        match receive(messages, &mut session).await {
            Err(end) => return end,
            Ok(AggregatedMessage::Pong(pong)) if liveness.probe.is_answered_by(&pong) => reporter.alive().await,
            Ok(_) => {}
        }
        liveness.has_received.set(true);
    }
}

/// The next message; pings are answered.
async fn receive(
    messages: &mut AggregatedMessageStream,
    session: &mut Session,
) -> Result<AggregatedMessage, SocketEnd> {
    match messages.recv().await {
        Some(Err(ProtocolError::Io(error))) if error.kind() == io::ErrorKind::InvalidData => {
            Err(SocketEnd::Broker(CloseCause::NotUtf8))
        }
        None | Some(Err(ProtocolError::Io(_))) => Err(SocketEnd::Lost),
        Some(Err(error)) => Err(SocketEnd::Broker(CloseCause::Protocol(error.to_string()))),
        Some(Ok(AggregatedMessage::Close(reason))) => Err(SocketEnd::Client(reason)),
        Some(Ok(message)) => {
            if let AggregatedMessage::Ping(payload) = &message {
                session.pong(payload).await.map_err(|_| SocketEnd::Lost)?;
            }
            Ok(message)
        }
    }
}

/// Sends the messages of the tenants' task to the member. `joined` is called with the answer.
async fn write(
    queue: &mut mpsc::Receiver<Outgoing>,
    mut member_writer: MemberWriter<'_>,
    form: Form,
    joined: impl Fn(),
) -> SocketEnd {
    while let Some(outgoing) = queue.recv().await {
        let sent = match outgoing {
            Outgoing::Answer(welcome) => {
                joined();
                member_writer.text_in_parts(answer(&welcome, form)).await
            }
            Outgoing::Text(text) => member_writer.text(text).await,
        };
        if sent.is_err() {
            return SocketEnd::Lost;
        }
    }
    // `end` delivers the reason.
    pending().await
}

/// Pings the member when the tenants' task probes it. Messages in the queue are sent later: on a slow line they take
/// longer than the member has for its answer.
async fn send_probes(probes: &mut mpsc::Receiver<()>, mut session: Session, probe: &PingProbe) -> SocketEnd {
    while probes.recv().await.is_some() {
        if session.ping(&probe.begin(fastrand::u64(..))).await.is_err() {
            return SocketEnd::Lost;
        }
    }
    pending().await
}

/// Returns when the member is lost.
async fn watch(mut session: Session, liveness: &MemberLiveness) -> SocketEnd {
    sleep(PING_INTERVAL).await;
    loop {
        liveness.has_received.set(false);
        let is_sent = timeout(PING_INTERVAL, session.ping(b"")).await.is_ok();
        sleep(PING_INTERVAL).await;
        if !is_sent || !liveness.has_received.get() {
            return SocketEnd::Broker(CloseCause::Silent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_pong_with_the_payload_of_a_probe_is_its_answer() {
        let probe = PingProbe::default();
        assert!([&b""[..], b"probe", &[0; 8]].iter().all(|pong| !probe.is_answered_by(pong)), "none was sent");
        let payload = probe.begin(7);
        assert_eq!(
            [&b""[..], b"probe", &payload, &payload].map(|pong| probe.is_answered_by(pong)),
            [false, false, true, false]
        );
        let (before, last) = (probe.begin(8), probe.begin(9));
        assert_eq!([before, last].map(|pong| probe.is_answered_by(&pong)), [false, true]);
    }
}
