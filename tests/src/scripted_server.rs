//! An MQTT server that misbehaves on command, for faults that a real server does not show on demand.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use bytes::BytesMut;
use rumqttc::{
    ConnAck, ConnectReturnCode, Packet, PubAck, Publish, QoS, SubAck, Subscribe, SubscribeReasonCode, matches,
};

use crate::probe::Message;

/// The faults of the server.
#[derive(Debug, Clone, Default)]
pub struct Behaviour {
    /// It refuses filters that contain one of these texts.
    pub refuses: Vec<String>,
    /// It does not answer a SUBSCRIBE.
    pub is_silent: bool,
    /// It delivers no message whose topic contains this text.
    pub swallows: Option<String>,
    /// Its retained messages, and the delay of their delivery after the SUBACK.
    pub retained: (Duration, Vec<Message>),
}

/// The server. It lives as long as the process.
#[derive(Clone)]
pub struct ScriptedServer {
    /// Its address.
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    behaviour: Behaviour,
    connected: Vec<String>,
    last: usize,
    clients: BTreeMap<usize, Client>,
    subscribed: Vec<String>,
    swallowed: Vec<bytes::Bytes>,
}

struct Client {
    stream: TcpStream,
    filters: Vec<String>,
}

impl ScriptedServer {
    /// Starts serving.
    #[must_use]
    pub fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let server = Self { address, state: Arc::new(Mutex::new(State { behaviour, ..State::default() })) };
        let accepting = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = accepting.clone();
                thread::spawn(move || server.serve(stream));
            }
        });
        server
    }

    /// Changes the faults.
    pub fn behave(&self, behaviour: Behaviour) {
        self.lock().behaviour = behaviour;
    }

    /// The client ids of all connections so far.
    #[must_use]
    pub fn connections(&self) -> Vec<String> {
        self.lock().connected.clone()
    }

    /// The number of subscriptions to a filter that contains `text`.
    #[must_use]
    pub fn subscriptions(&self, text: &str) -> usize {
        self.lock().subscribed.iter().filter(|filter| filter.contains(text)).count()
    }

    /// The number of undelivered messages with this payload.
    #[must_use]
    pub fn swallowed(&self, payload: &str) -> usize {
        self.lock().swallowed.iter().filter(|swallowed| *swallowed == payload).count()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves one client until it disconnects.
    fn serve(&self, mut stream: TcpStream) {
        let number = {
            let mut state = self.lock();
            let client = Client { stream: stream.try_clone().expect("a stream"), filters: vec![] };
            state.last += 1;
            let number = state.last;
            state.clients.insert(number, client);
            number
        };
        let (mut input, mut buffer) = (BytesMut::new(), [0; 4096]);
        'connection: while let Ok(length @ 1..) = stream.read(&mut buffer) {
            input.extend_from_slice(&buffer[..length]);
            loop {
                match Packet::read(&mut input, 1 << 20) {
                    Ok(packet) => self.take(number, packet),
                    Err(rumqttc::Error::InsufficientBytes(_)) => break,
                    Err(_) => break 'connection,
                }
            }
        }
        self.lock().clients.remove(&number);
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "clients send only a few of the packets there are")]
    fn take(&self, number: usize, packet: Packet) {
        match packet {
            Packet::Connect(connect) => {
                let mut state = self.lock();
                state.connected.push(connect.client_id);
                state.send(number, &Packet::ConnAck(ConnAck::new(ConnectReturnCode::Success, false)));
            }
            Packet::Subscribe(subscribe) => self.subscribe(number, &subscribe),
            Packet::Publish(publish) => {
                let mut state = self.lock();
                if publish.qos == QoS::AtLeastOnce {
                    state.send(number, &Packet::PubAck(PubAck::new(publish.pkid)));
                }
                state.deliver(&publish);
            }
            Packet::PingReq => self.lock().send(number, &Packet::PingResp),
            _ => {}
        }
    }

    fn subscribe(&self, number: usize, subscribe: &Subscribe) {
        let mut state = self.lock();
        let Behaviour { refuses, is_silent, retained, .. } = state.behaviour.clone();
        let filters: Vec<_> = subscribe.filters.iter().map(|filter| filter.path.clone()).collect();
        state.subscribed.extend(filters.clone());
        let is_refused = |filter: &String| refuses.iter().any(|part| filter.contains(part));
        let codes = filters.iter().map(|filter| {
            if is_refused(filter) {
                SubscribeReasonCode::Failure
            } else {
                SubscribeReasonCode::Success(QoS::AtMostOnce)
            }
        });
        let codes = codes.collect();
        let granted: Vec<_> = filters.into_iter().filter(|filter| !is_refused(filter)).collect();
        if is_silent {
            return;
        }
        if let Some(client) = state.clients.get_mut(&number) {
            client.filters.extend(granted.clone());
        }
        state.send(number, &Packet::SubAck(SubAck::new(subscribe.pkid, codes)));
        drop(state);
        let (pause, retained) = retained;
        let found: Vec<_> = retained
            .into_iter()
            .filter(|message| granted.iter().any(|filter| matches(&message.topic, filter)))
            .collect();
        let server = self.clone();
        thread::spawn(move || {
            thread::sleep(pause);
            for message in found {
                let mut publish = Publish::new(message.topic, QoS::AtMostOnce, message.payload);
                publish.retain = true;
                server.lock().send(number, &Packet::Publish(publish));
            }
        });
    }
}

impl State {
    fn send(&mut self, number: usize, packet: &Packet) {
        let mut bytes = BytesMut::new();
        packet.write(&mut bytes, usize::MAX).expect("a packet");
        if let Some(client) = self.clients.get_mut(&number) {
            // The client may have disconnected.
            let _ = client.stream.write_all(&bytes);
        }
    }

    fn deliver(&mut self, publish: &Publish) {
        if self.behaviour.swallows.as_ref().is_some_and(|part| publish.topic.contains(part)) {
            self.swallowed.push(publish.payload.clone());
            return;
        }
        let publish = Publish::new(&publish.topic, QoS::AtMostOnce, publish.payload.clone());
        let hears = |client: &Client| client.filters.iter().any(|filter| matches(&publish.topic, filter));
        let numbers: Vec<_> =
            self.clients.iter().filter(|(_, client)| hears(client)).map(|(number, _)| *number).collect();
        for number in numbers {
            self.send(number, &Packet::Publish(publish.clone()));
        }
    }
}
