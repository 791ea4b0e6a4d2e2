//! One connection to the MQTT server to check a program's rights there. It changes nothing: it only publishes an echo
//! to itself, which is not retained.
//!
//! No task: a command awaits [`attempt`].

use std::time::Duration;

use rumqttc::{
    AsyncClient, ConnectionError, Event, EventLoop, Incoming, Publish, QoS, SubscribeFilter, SubscribeReasonCode,
};
use tokio::time::{Instant, timeout_at};

use super::cause::{Attempt, Fault};
use super::subscriptions::Filter;
use super::tls_probe::speaks_tls;
use super::{INFLIGHT, SessionConfig, TlsError, options};
use crate::Topic;
use crate::config::Mqtt;

/// The timeout for the login, and for the answer to the subscriptions.
const SERVER_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the echo may take.
const TRIAL_ECHO_TIMEOUT: Duration = Duration::from_secs(3);
/// How long to wait for retained messages after it.
const RETAINED_WAIT: Duration = Duration::from_millis(300);

/// The result of a trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// The server, for people.
    pub server: String,
    /// The facts about an accepted connection; or why there is none.
    pub outcome: Result<Allowed, ConnectFailure>,
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectFailure {
    /// The setting or the server that has to change.
    pub fault: Fault,
    /// The cause, in one line.
    pub cause: String,
}

/// The facts about an accepted connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Refused subscriptions that the program needs.
    pub refused: Vec<String>,
    /// Other refused subscriptions.
    pub refused_optional: Vec<String>,
    /// The result of a message that the client published to itself.
    pub echo: EchoOutcome,
    /// The wanted retained messages.
    pub retained: Vec<RetainedPublish>,
}

/// The result of a message that the client published to itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EchoOutcome {
    /// It was received.
    Received,
    /// It was not received.
    #[default]
    Lost,
    /// The server closed the connection.
    Closed,
}

/// A retained message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainedPublish {
    /// Its topic.
    pub topic: String,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Connects as the client `id`, subscribes to the filters of `sessions`, and publishes to `echo`; returns the retained
/// messages on topics that are `wanted`.
pub async fn attempt(
    config: &Mqtt,
    id: String,
    sessions: &[SessionConfig],
    echo: &Topic,
    wanted: impl Fn(&str) -> bool,
) -> Result<Trial, TlsError> {
    let (options, network, server) = options::options(config, &SessionConfig::secondary(id.clone()))?;
    let (client, mut eventloop) = AsyncClient::new(options, usize::from(INFLIGHT));
    eventloop.set_network_options(network);
    let mut filters: Vec<Filter> = Vec::new();
    for filter in sessions.iter().flat_map(SessionConfig::filters) {
        if !filters.iter().any(|known| known.text == filter.text) {
            filters.push(filter);
        }
    }
    let mut cause = Attempt::new(config, &id);
    let mut line = TrialConnection { client, eventloop, retained: Vec::new(), wanted };
    let outcome = match line.connect().await {
        Ok(()) => line.try_out(&filters, echo, &id).await.map_err(|error| (error, true)),
        Err(error) => Err((error, false)),
    };
    if let Err((error, accepted)) = &outcome
        && let Some((host, port)) = cause.may_need_tls(error, *accepted)
    {
        cause.server_speaks_tls(speaks_tls(&host, port).await);
    }
    let outcome = outcome.map_err(|(error, accepted)| ConnectFailure {
        fault: cause.fault(&error, accepted),
        cause: cause.describe(&error, accepted),
    });
    Ok(Trial { server, outcome })
}

/// The connection.
struct TrialConnection<W> {
    client: AsyncClient,
    eventloop: EventLoop,
    retained: Vec<RetainedPublish>,
    wanted: W,
}

impl<W: Fn(&str) -> bool> TrialConnection<W> {
    async fn connect(&mut self) -> Result<(), ConnectionError> {
        let until = Instant::now() + SERVER_ANSWER_TIMEOUT;
        self.wait(until, |incoming| matches!(incoming, Incoming::ConnAck(_)).then_some(())).await
    }

    async fn try_out(&mut self, filters: &[Filter], echo: &Topic, id: &str) -> Result<Allowed, ConnectionError> {
        let mut allowed = Allowed::default();
        let wanted = filters.iter().map(|filter| SubscribeFilter::new(filter.text.clone(), filter.qos));
        if self.client.try_subscribe_many(wanted).is_err() {
            return Err(ConnectionError::RequestsDone);
        }
        let until = Instant::now() + SERVER_ANSWER_TIMEOUT;
        let codes = self
            .wait(
                until,
                |incoming| if let Incoming::SubAck(ack) = incoming { Some(ack.return_codes.clone()) } else { None },
            )
            .await?;
        for (place, filter) in filters.iter().enumerate() {
            let is_granted = matches!(codes.get(place), Some(SubscribeReasonCode::Success(_)));
            let refused = if filter.is_required { &mut allowed.refused } else { &mut allowed.refused_optional };
            refused.extend((!is_granted).then(|| filter.text.clone()));
        }
        allowed.echo = self.echo(&echo.to_string(), &format!("{id} {:016x}", fastrand::u64(..))).await;
        if allowed.echo != EchoOutcome::Closed {
            // Only the end of it matters.
            let _ = self.wait(Instant::now() + RETAINED_WAIT, |_| None::<()>).await;
            let _ = self.client.try_disconnect();
            let _ = self.wait(Instant::now() + RETAINED_WAIT, |_| None::<()>).await;
        }
        allowed.retained = std::mem::take(&mut self.retained);
        Ok(allowed)
    }

    async fn echo(&mut self, topic: &str, text: &str) -> EchoOutcome {
        if self.client.try_publish(topic, QoS::AtMostOnce, false, text).is_err() {
            return EchoOutcome::Lost;
        }
        let is_echo = |publish: &Publish| publish.topic == topic && publish.payload == text.as_bytes();
        let came = self.wait(Instant::now() + TRIAL_ECHO_TIMEOUT, |incoming| {
            if let Incoming::Publish(publish) = incoming { is_echo(publish).then_some(()) } else { None }
        });
        match came.await {
            Ok(()) => EchoOutcome::Received,
            Err(ConnectionError::NetworkTimeout) => EchoOutcome::Lost,
            Err(_) => EchoOutcome::Closed,
        }
    }

    /// Applies `found` to the packets that are received until then.
    async fn wait<T>(
        &mut self,
        until: Instant,
        mut found: impl FnMut(&Incoming) -> Option<T>,
    ) -> Result<T, ConnectionError> {
        loop {
            let event =
                timeout_at(until, self.eventloop.poll()).await.unwrap_or(Err(ConnectionError::NetworkTimeout))?;
            let Event::Incoming(incoming) = event else { continue };
            if let Incoming::Publish(publish) = &incoming
                && publish.retain
                && (self.wanted)(&publish.topic)
            {
                self.retained.push(RetainedPublish { topic: publish.topic.clone(), payload: publish.payload.to_vec() });
            }
            if let Some(found) = found(&incoming) {
                return Ok(found);
            }
        }
    }
}
