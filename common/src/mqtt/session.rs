//! One connection of a program: its task.

use std::mem::take;
use std::pin::{Pin, pin};

use rumqttc::{AsyncClient, ConnectionError, EventLoop, Incoming, MqttState, Outgoing, Publish, QoS, SubAck};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::echo::Echo;
use super::options;
use super::outbox::{Outbox, PendingPublish};
use super::pair::{Guest, Joining, Pair};
use super::reconnect::{Reconnect, describe, dot_hint, is_closed};
use super::subscriptions::Subscriptions;
use super::{ConnectionState, Event, INFLIGHT, Message, MqttHandle, PublishError, SessionConfig, TlsError};
use crate::Topic;
use crate::config::Mqtt;

/// Orders that may wait for the session; a publisher waits for a place, and its own deadline bounds that.
const COMMAND_QUEUE: usize = 1024;

/// The task behind a [`MqttHandle`].
pub struct Session {
    client: AsyncClient,
    eventloop: EventLoop,
    orders: mpsc::Receiver<PendingPublish>,
    outbox: Outbox,
    state: watch::Sender<ConnectionState>,
    subscriptions: Subscriptions,
    /// Where it publishes to itself, as a topic and as text, and what it knows of that.
    echo_topic: Option<(Topic, String)>,
    echo: Echo,
    is_connected: bool,
    id: String,
    is_secondary: bool,
    server: String,
    reconnect: Reconnect,
    /// A name in its topics with a dot.
    dotted: Option<String>,
    /// What it has of the program's other session.
    pair: Option<Pair>,
    /// The other session, if that publishes and subscribes through this one.
    guest: Option<Guest>,
}

/// The two sessions of a program, `second` made by [`SessionConfig::secondary`]. Where the server lets a program have one connection
/// only, the second goes through the first.
pub fn open_pair(
    config: &Mqtt,
    first: SessionConfig,
    second: SessionConfig,
) -> Result<[(MqttHandle, Session); 2], TlsError> {
    let (mut first, mut second) = (open(config, first)?, open(config, second)?);
    let [of_first, of_second] = Pair::new(first.0.orders.clone());
    (first.1.pair, second.1.pair) = (Some(of_first), Some(of_second));
    Ok([first, second])
}

/// A session with the configured server, not yet connected: [`Session::run`] does that.
pub fn open(config: &Mqtt, client: SessionConfig) -> Result<(MqttHandle, Session), TlsError> {
    let (options, network, server) = options::options(config, &client)?;
    let (rumqtt, mut eventloop) = AsyncClient::new(options, usize::from(INFLIGHT) + 16);
    eventloop.set_network_options(network);
    let (sender, orders) = mpsc::channel(COMMAND_QUEUE);
    let (state, watched) = watch::channel(ConnectionState::Down(format!("not connected to {server} yet")));
    let session = Session {
        client: rumqtt,
        eventloop,
        orders,
        outbox: Outbox::default(),
        state,
        subscriptions: Subscriptions::new(client.filters()),
        dotted: client.dotted(),
        echo_topic: client.echo.map(|topic| (topic.clone(), topic.to_string())),
        echo: Echo::default(),
        is_connected: false,
        id: client.id,
        is_secondary: client.is_secondary,
        server,
        reconnect: Reconnect::default(),
        pair: None,
        guest: None,
    };
    Ok((MqttHandle { orders: sender, state: watched }, session))
}

impl Session {
    /// Runs until `stop` returns, then disconnects, so that the server does not publish the will; what must be
    /// acknowledged before that, its publisher awaits first. `on_event` is called in this task: it must not block.
    pub async fn run(mut self, mut on_event: impl FnMut(Event), stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        while let Some(event) = self.next(stop.as_mut()).await {
            match event {
                Ok(event) => self.handle(event, &mut on_event),
                Err(error) => {
                    self.on_disconnect(&error, &mut on_event);
                    if self.pair.as_ref().is_some_and(Pair::has_to_join) {
                        return self.join(&mut on_event, stop).await;
                    }
                    tokio::select! {
                        () = sleep(self.reconnect.pause()) => {}
                        () = &mut stop => return,
                    }
                }
            }
        }
        self.disconnect().await;
    }

    /// Goes on through the program's first session, until `stop` returns.
    async fn join(self, on_event: &mut impl FnMut(Event), mut stop: Pin<&mut impl Future<Output = ()>>) {
        let Self { client, eventloop, mut orders, mut outbox, state, subscriptions, server, pair, .. } = self;
        drop((client, eventloop));
        let Some(Pair { joining: Joining::Second { guests, orders: first }, .. }) = pair else { return };
        warn!(server, "the MQTT server lets this program have one connection only: it uses one for both purposes");
        let (guest, mut events) = Guest::new(subscriptions.filters().cloned().collect());
        if guests.send(guest).await.is_err() {
            return;
        }
        let mut next: Option<PendingPublish> = None;
        loop {
            let up = *state.borrow() == ConnectionState::Up;
            if up && next.is_none() {
                next = outbox.next();
            }
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else { return };
                    match &event {
                        Event::Up => drop(state.send_replace(ConnectionState::Up)),
                        Event::Down => drop(state.send_replace(ConnectionState::Down(format!("{server}: connection lost")))),
                        Event::Message(_) => {}
                    }
                    on_event(event);
                }
                publish = orders.recv(), if up && next.is_none() => next = publish,
                permit = first.reserve(), if next.is_some() => {
                    let (Ok(permit), Some(publish)) = (permit, next.take()) else { return };
                    permit.send(publish);
                }
                () = &mut stop => return,
            }
        }
    }

    /// The next event of rumqttc, or none when it is time to stop. Orders are taken meanwhile, without ever
    /// dropping a poll half done on a connection that goes on.
    async fn next(
        &mut self,
        mut stop: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<Result<rumqttc::Event, ConnectionError>> {
        let mut poll = pin!(self.eventloop.poll());
        let up = *self.state.borrow() == ConnectionState::Up;
        loop {
            let now = Instant::now();
            let is_overdue = self.subscriptions.is_overdue(now) || self.outbox.is_overdue(now);
            if self.is_connected && (is_overdue || self.echo.is_lost(now)) {
                return Some(Err(ConnectionError::NetworkTimeout));
            }
            if let Some(filters) = self.is_connected.then(|| self.subscriptions.next(now)).flatten()
                && self.client.try_subscribe_many(filters).is_err()
            {
                warn!(server = self.server, "subscription found no place");
            }
            let room = up && self.outbox.in_flight() < usize::from(INFLIGHT);
            if room
                && let Some((topic, _)) = &self.echo_topic
                && self.echo.is_due(now)
            {
                let echo = Message { qos: QoS::AtMostOnce, ..Message::transient(topic.clone(), self.id.clone()) };
                self.outbox.enqueue(PendingPublish::new(echo, None), &self.client);
                continue;
            }
            let room = room && !self.echo.must_wait(now);
            let is_silenced = self.echo.is_forbidden(now);
            if let Some(publish) = room.then(|| self.outbox.next()).flatten() {
                enqueue(publish, is_silenced, &mut self.outbox, &self.client);
                continue;
            }
            let due = self.subscriptions.due().into_iter().chain(self.echo.next(now)).chain(self.outbox.due()).min();
            tokio::select! {
                event = &mut poll => return Some(event),
                Some(publish) = self.orders.recv(), if room => {
                    enqueue(publish, is_silenced, &mut self.outbox, &self.client);
                }
                Some(guest) = joined(&mut self.pair), if self.guest.is_none() => {
                    // The next connection is one for both.
                    let filters = self.subscriptions.filters().chain(&guest.filters).cloned();
                    self.subscriptions = Subscriptions::new(filters);
                    self.guest = Some(guest);
                    return Some(Err(ConnectionError::NetworkTimeout));
                }
                () = &mut stop => return None,
                () = sleep_until(due.unwrap_or(now)), if self.is_connected && due.is_some() => {}
            }
        }
    }

    fn handle(&mut self, event: rumqttc::Event, on_event: &mut impl FnMut(Event)) {
        if matches!(event, rumqttc::Event::Incoming(_)) {
            // Behind a long queue a pong comes late. rumqttc would take a server for dead that is heard all the time.
            self.eventloop.state.await_pingresp = false;
        }
        match event {
            rumqttc::Event::Incoming(Incoming::ConnAck(_)) => self.connected(on_event),
            rumqttc::Event::Incoming(Incoming::SubAck(ack)) => self.subscribed(&ack, on_event),
            rumqttc::Event::Incoming(Incoming::Publish(publish)) if self.is_echo(&publish) => self.echo_came(&publish),
            rumqttc::Event::Incoming(Incoming::Publish(publish)) => {
                if !publish.retain {
                    self.echo.message(Instant::now());
                }
                match &self.guest {
                    Some(guest) if guest.wants(&publish) => guest.hand_on(Event::Message(publish)),
                    _ => on_event(Event::Message(publish)),
                }
            }
            rumqttc::Event::Incoming(Incoming::PubAck(ack)) => self.outbox.acknowledged(ack.pkid),
            rumqttc::Event::Outgoing(Outgoing::Publish(pkid)) => self.outbox.sent(pkid, Instant::now()),
            rumqttc::Event::Incoming(_) | rumqttc::Event::Outgoing(_) => {}
        }
    }

    fn connected(&mut self, on_event: &mut impl FnMut(Event)) {
        let now = Instant::now();
        self.is_connected = true;
        self.reconnect.connected(now);
        if let Some(pair) = &self.pair {
            pair.connected(now);
        }
        self.subscriptions.reset();
        if self.subscriptions.is_complete() {
            self.up(on_event);
        }
    }

    fn subscribed(&mut self, ack: &SubAck, on_event: &mut impl FnMut(Event)) {
        for filter in self.subscriptions.answered(&ack.return_codes, Instant::now()) {
            let hint = dot_hint(&filter);
            warn!(server = self.server, client = self.id, filter, "subscription refused by the MQTT server{hint}");
        }
        if *self.state.borrow() == ConnectionState::Up {
            return;
        }
        if self.subscriptions.is_complete() {
            self.up(on_event);
        } else if let Some(filter) = self.subscriptions.refused() {
            let hint = dot_hint(filter);
            let reason = format!("{}: the server refuses the subscription to {filter}{hint}", self.server);
            self.state.send_replace(ConnectionState::Down(reason));
        }
    }

    fn is_echo(&self, publish: &Publish) -> bool {
        self.echo_topic.as_ref().is_some_and(|(_, topic)| *topic == publish.topic)
    }

    /// The other connection of this program has the same topic.
    fn echo_came(&mut self, publish: &Publish) {
        if publish.payload == self.id.as_bytes() {
            self.echo.heard(Instant::now());
        }
    }

    fn up(&mut self, on_event: &mut impl FnMut(Event)) {
        if !self.is_secondary {
            info!(server = self.server, client = self.id, "MQTT connected");
        }
        if self.echo.is_given_up() {
            let server = &self.server;
            warn!(
                server,
                client = self.id,
                "nothing comes back of what this program publishes to itself: may it do that?"
            );
        }
        if self.echo_topic.as_ref().is_some_and(|(_, topic)| self.subscriptions.is_granted(topic)) {
            self.echo.up(Instant::now());
        }
        self.state.send_replace(ConnectionState::Up);
        on_event(Event::Up);
        if let Some(guest) = &self.guest {
            guest.hand_on(Event::Up);
        }
    }

    /// What rumqttc still holds to be sent is in the outbox too, and is published again from there. What it has received is
    /// handed on; it would do so on the next connection, and take the answer to a SUBSCRIBE of this one for that of the next.
    fn on_disconnect(&mut self, error: &ConnectionError, on_event: &mut impl FnMut(Event)) {
        self.eventloop.clean();
        self.eventloop.pending.clear();
        let received = take(&mut self.eventloop.state.events);
        self.eventloop.state = MqttState::new(INFLIGHT, false);
        for event in received {
            if !matches!(event, rumqttc::Event::Incoming(Incoming::ConnAck(_) | Incoming::SubAck(_))) {
                self.handle(event, on_event);
            }
        }
        self.outbox.on_disconnect();
        let now = Instant::now();
        let is_over_echo = self.echo.down(is_closed(error), now);
        if is_over_echo && self.echo.is_forbidden(now) {
            warn!(
                server = self.server,
                client = self.id,
                "the MQTT server ends the connection when this program publishes below wgkex/, as where an access list \
                 does not allow it: nothing is published there for now, so keys are not confirmed"
            );
        }
        if let Some(pair) = &self.pair {
            pair.lost(!is_over_echo, now);
        }
        self.is_connected = false;
        self.subscriptions.reset();
        if !is_over_echo {
            self.count(error);
        }
        let is_name_suspect = self.reconnect.is_closed_early();
        let hint = self.dotted.as_ref().filter(|_| is_name_suspect).map(|name| dot_hint(name));
        let down = ConnectionState::Down(format!(
            "{}: {}{}",
            self.server,
            describe(error),
            hint.as_deref().unwrap_or_default()
        ));
        let before = self.state.send_replace(down.clone());
        // The name may be in filters of the second alone.
        let is_new = hint.is_some() && self.reconnect.is_closed_early_first();
        if let (ConnectionState::Down(reason), true) = (&down, down != before && (!self.is_secondary || is_new)) {
            warn!(reason, client = self.id, "MQTT not connected");
        }
        on_event(Event::Down);
        if let Some(guest) = &self.guest {
            guest.hand_on(Event::Down);
        }
    }

    fn count(&mut self, error: &ConnectionError) {
        let was_up = *self.state.borrow() == ConnectionState::Up;
        if self.reconnect.lost(error, was_up) {
            warn!(
                server = self.server,
                client = self.id,
                "the MQTT server closes each connection as soon as it stands: another program may use this name as its \
                 client id, or the server refuses something that this program subscribes to or publishes"
            );
        }
    }

    async fn disconnect(mut self) {
        if *self.state.borrow() != ConnectionState::Up || self.client.try_disconnect().is_err() {
            return;
        }
        while let Ok(event) = self.eventloop.poll().await {
            if event == rumqttc::Event::Outgoing(Outgoing::Disconnect) {
                return;
            }
        }
    }
}

/// The other session of a program, when it joins the first one's connection.
async fn joined(pair: &mut Option<Pair>) -> Option<Guest> {
    match pair {
        Some(Pair { joining: Joining::First(joining), .. }) => joining.recv().await,
        _ => None,
    }
}

/// Gives a publish to rumqttc, unless the server would end the connection over it.
fn enqueue(publish: PendingPublish, is_silenced: bool, outbox: &mut Outbox, client: &AsyncClient) {
    if is_silenced && publish.is_ours() {
        publish.end(Err(PublishError::NotAllowed));
    } else {
        outbox.enqueue(publish, client);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::thread;

    use std::time::Duration;

    use super::*;
    use crate::Config;

    /// A server that answers no ping, and says something all the time if it is `talkative`, until its client goes.
    fn start_deaf_server(talkative: bool) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut packet = [0; 512];
            let _connect = client.read(&mut packet).unwrap();
            client.write_all(&[0x20, 2, 0, 0]).unwrap();
            let _subscribe = client.read(&mut packet).unwrap();
            client.write_all(&[0x90, 3, packet[2], packet[3], 0]).unwrap();
            let publish = [0x30, 4, 0, 1, b'a', b'x'];
            while client.write_all(if talkative { &publish } else { &[] }).is_ok() {
                thread::sleep(Duration::from_millis(50));
            }
        });
        port
    }

    /// How often the connection to such a server was lost after some keep-alives.
    async fn losses(talkative: bool) -> usize {
        let port = start_deaf_server(talkative);
        let yaml = format!(
            "domains: [ff_a]\ndomain_prefixes: [ff_]\nmqtt: {{broker_url: 127.0.0.1, broker_port: {port}, keepalive: 1}}"
        );
        let config = Config::parse("", &yaml, "w").unwrap();
        let client = SessionConfig { qos0_filters: vec!["a".into()], ..SessionConfig::secondary("w".into()) };
        let (_bus, session) = open(&config.mqtt, client).unwrap();
        let (lost, counted) = mpsc::unbounded_channel();
        let on_event = move |event| {
            if matches!(event, Event::Down) {
                lost.send(()).unwrap();
            }
        };
        session.run(on_event, sleep(Duration::from_secs(5))).await;
        counted.len()
    }

    /// A server that delivers a message, grants a subscription and breaks the connection, all at once; then it lets the
    /// client in, and answers no more.
    fn start_leaving_server() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let mut packet = [0; 512];
            let (mut client, _) = listener.accept().unwrap();
            let _connect = client.read(&mut packet).unwrap();
            client.write_all(&[0x20, 2, 0, 0]).unwrap();
            let _subscribe = client.read(&mut packet).unwrap();
            let (publish, granted) = ([0x30, 4, 0, 1, b'a', b'x'], [0x90, 3, packet[2], packet[3], 0]);
            // There is no packet of type 0: with it the connection is over for the client.
            client.write_all(&[&publish[..], &granted, &[0, 0]].concat()).unwrap();
            let (mut again, _) = listener.accept().unwrap();
            let _connect = again.read(&mut packet).unwrap();
            again.write_all(&[0x20, 2, 0, 0]).unwrap();
            while again.read(&mut packet).is_ok_and(|length| length > 0) {}
        });
        port
    }

    /// rumqttc keeps what it has read when a connection breaks, and returns it on the next one.
    #[tokio::test]
    async fn what_came_with_a_loss_is_handed_on_and_is_none_of_the_next_connection() {
        let port = start_leaving_server();
        let yaml =
            format!("domains: [ff_a]\ndomain_prefixes: [ff_]\nmqtt: {{broker_url: 127.0.0.1, broker_port: {port}}}");
        let config = Config::parse("", &yaml, "w").unwrap();
        let client = SessionConfig { qos0_filters: vec!["a".into()], ..SessionConfig::secondary("w".into()) };
        let (_bus, session) = open(&config.mqtt, client).unwrap();
        let (events, mut handed_on) = mpsc::unbounded_channel();
        let on_event = move |event| {
            let _ = events.send(match event {
                Event::Up => "up",
                Event::Down => "down",
                Event::Message(_) => "message",
            });
        };
        session.run(on_event, sleep(Duration::from_secs(2))).await;
        let mut all = Vec::new();
        while let Ok(event) = handed_on.try_recv() {
            all.push(event);
        }
        assert_eq!(all, ["message", "down"]);
    }

    #[tokio::test]
    async fn a_server_that_is_heard_is_not_dead_although_its_pongs_are_late() {
        let (talkative, silent) = tokio::join!(losses(true), losses(false));
        assert_eq!((talkative, silent > 0), (0, true), "{silent}");
    }
}
