mod hub;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use proptest::prelude::*;
use tokio::sync::{mpsc, oneshot};
use wgkex_common::PublicKey;
use wgkex_common::address::tenants::TenantNetworks;
use wgkex_common::wire::message::ServiceAnnouncement;

use super::*;
use crate::client_ip::Client;
use crate::metrics::MetricsRegistry;
use crate::tenants::authority::PROBE_TIMEOUT;
use crate::tenants::clients::Clients;
use crate::tenants::id::TenantId;
use crate::tenants::message::{Form, Welcome};
use crate::tenants::sessions::Outgoing;
use crate::tenants::store::{AddressBuffer, Addresses};
use crate::tenants::table::{Member, MemberInfo};

const GRACE: Duration = Duration::from_secs(60);
/// The worker that is the hub.
const HUB_WORKER: &str = "gw1";

/// Brokers on a bus that is moved by hand, and sessions that are only channels.
struct Rig {
    brokers: Vec<Broker>,
    now: Instant,
    last: u64,
    /// The client of the next sessions.
    client: Client,
}

struct Broker {
    name: BrokerName,
    tenants: Coordination,
    kept: AddressBuffer,
    /// Whether the bus reaches it.
    is_reached: bool,
}

/// A session that wants to be a member.
struct Guest {
    broker: usize,
    session: SessionId,
    queue: mpsc::Receiver<Outgoing>,
    probes: mpsc::Receiver<()>,
    end: oneshot::Receiver<CloseCause>,
}

fn new_broker(number: u64, pool: &str, length: u8, addresses: Addresses, now: Instant) -> Broker {
    let name: BrokerName = format!("b{number}").parse().unwrap();
    let announced = ServiceAnnouncement { since: number, rules: "r".into() };
    let metrics = Metrics::register(&MetricsRegistry::default()).unwrap();
    let kept = AddressBuffer::default();
    let networks = TenantNetworks { pool: vec![pool.parse().unwrap()], tenant_length: length };
    let hub = TenantHub::new(HUB_WORKER.parse().unwrap(), networks.clone());
    let settings =
        TenantSettings { networks: networks.clone(), grace: GRACE, tokens_file: None, hub: Some(hub.worker().clone()) };
    let clients = Clients::new(networks.count());
    let sessions = Sessions::new(name.clone(), clients, addresses, kept.clone(), metrics.clone()).with_hub(Some(hub));
    let election = Election::new(name.clone(), announced, now);
    let tenants = Coordination::new(name.clone(), settings, sessions, election, 1000 * number, Arc::default(), metrics);
    Broker { name, tenants, kept, is_reached: true }
}

impl Rig {
    /// One broker, which is the coordinator.
    fn new(pool: &str, length: u8) -> Self {
        let now = Instant::now();
        let mut rig = Self::with(new_broker(0, pool, length, Addresses::new(), now), now);
        rig.wait(Duration::from_secs(5));
        rig
    }

    fn with(broker: Broker, now: Instant) -> Self {
        Self { brokers: vec![broker], now, last: 0, client: Client::Local }
    }

    /// Several brokers on one bus, of which the first is the coordinator.
    fn of(brokers: u64) -> Self {
        let mut rig = Self::new("10.64.0.0/10", 20);
        for number in 1..brokers {
            rig.brokers.push(new_broker(number, "10.64.0.0/10", 20, Addresses::new(), rig.now));
        }
        rig.introduce();
        rig.wait(Duration::from_secs(5));
        rig
    }

    /// All brokers that the bus reaches receive each other's states.
    fn introduce(&mut self) {
        let known = self
            .brokers
            .iter_mut()
            .map(|broker| (broker.name.clone(), broker.tenants.election().announced().clone(), broker.is_reached));
        let known: Vec<_> = known.collect();
        let now = self.now;
        for broker in &mut self.brokers {
            let own_is_reached = broker.is_reached;
            let election = broker.tenants.election();
            election.on_bus(own_is_reached, now);
            if own_is_reached {
                for (name, announced, is_reached) in &known {
                    election.on_status(name.clone(), *is_reached, now);
                    election.on_hello(name.clone(), is_reached.then(|| announced.clone()), now);
                }
            }
        }
    }

    /// The bus loses a broker, or reaches it again.
    fn reach(&mut self, broker: usize, is_reached: bool) {
        self.brokers[broker].is_reached = is_reached;
        self.introduce();
    }

    /// A broker ends without a farewell; the bus notices it.
    fn kill(&mut self, broker: usize) -> Broker {
        self.reach(broker, false);
        let dead = new_broker(99, "10.64.0.0/10", 20, Addresses::new(), self.now);
        std::mem::replace(&mut self.brokers[broker], Broker { is_reached: false, ..dead })
    }

    /// Delivers the frames between brokers, until none is left.
    fn deliver(&mut self) {
        self.deliver_some(|| true);
    }

    fn deliver_some(&mut self, mut arrives: impl FnMut() -> bool) {
        for _ in 0..100 {
            let mut frames = Vec::new();
            for broker in self.brokers.iter_mut().filter(|broker| broker.is_reached) {
                frames.extend(broker.tenants.take_frames(self.now));
            }
            if frames.is_empty() {
                return;
            }
            for (to, frame) in frames {
                // As it is on the wire.
                let frame: Frame = serde_json::from_slice(&serde_json::to_vec(&frame).unwrap()).unwrap();
                let found = self.brokers.iter_mut().find(|broker| broker.name == to && broker.is_reached);
                if let Some(broker) = found.filter(|_| arrives()) {
                    broker.tenants.on_frame(frame, self.now);
                }
            }
        }
        panic!("brokers do not stop talking");
    }

    fn join_at(&mut self, broker: usize, tenant: &str, number: u8, form: Form, room: usize) -> Guest {
        self.last += 1;
        let session = SessionId(self.last);
        let (sender, queue) = mpsc::channel(room);
        let (probe_sender, probes) = mpsc::channel(1);
        let (ended, end) = oneshot::channel();
        let public_key = PublicKey::from_bytes([number; 32]).unwrap();
        let endpoint = (form.endpoints).then(|| [192, 0, 2, number].into());
        let client = MemberInfo { display_name: format!("N{number}"), public_key, endpoint };
        let link = SessionLink { client: self.client, form, queue: sender, probes: probe_sender, end: ended };
        let join_request = JoinRequest { session, tenant: TenantId::new(tenant).unwrap(), client };
        self.brokers[broker].tenants.join(join_request, link, self.now);
        Guest { broker, session, queue, probes, end }
    }

    fn join_in(&mut self, tenant: &str, number: u8, form: Form, room: usize) -> Guest {
        self.join_at(0, tenant, number, form, room)
    }

    fn join(&mut self, number: u8) -> Guest {
        self.join_in("t", number, Form::default(), 100)
    }

    /// At a broker of several.
    fn enter(&mut self, broker: usize, number: u8) -> Guest {
        let guest = self.join_at(broker, "t", number, Form::default(), 100);
        self.deliver();
        guest
    }

    fn leave(&mut self, guest: &Guest) {
        self.brokers[guest.broker].tenants.leave(guest.session, Leave::Closed, self.now);
        self.deliver();
    }

    fn alive(&mut self, guest: &Guest) {
        self.brokers[guest.broker].tenants.alive(guest.session, self.now);
        self.deliver();
    }

    /// Time passes, a second at a time.
    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = end.min(self.now + Duration::from_secs(1));
            self.tick();
            self.deliver();
        }
    }

    fn tick(&mut self) {
        for broker in &mut self.brokers {
            broker.tenants.tick(self.now);
        }
    }

    fn members(&self) -> usize {
        let all: Vec<_> = self.brokers.iter().map(|broker| broker.tenants.counts().members).collect();
        assert!(all.iter().all(|members| *members == all[0]), "{all:?}");
        all[0]
    }

    fn coordinators(&self) -> Vec<usize> {
        let is_one = |broker: &Broker| matches!(broker.tenants.role, TenantRole::Coordinator { .. });
        (0..self.brokers.len()).filter(|number| is_one(&self.brokers[*number])).collect()
    }
}

impl Guest {
    /// The messages received since the last call: `ADDRESS: NAMES` for an answer, `+NAME ADDRESS`, `-ADDRESS`; in the
    /// end `?` for a probe.
    fn received(&mut self) -> Vec<String> {
        let mut received = Vec::new();
        while let Ok(outgoing) = self.queue.try_recv() {
            received.push(match outgoing {
                Outgoing::Answer(welcome) => {
                    let Welcome { virtual_ip: address, peers, .. } = *welcome;
                    let names: Vec<_> = peers.iter().map(|peer| peer.client.display_name.as_str()).collect();
                    format!("{address}: {}", names.join(" "))
                }
                Outgoing::Text(text) => shown(&text),
            });
        }
        if self.probes.try_recv().is_ok() {
            received.push("?".into());
        }
        received
    }

    fn end(&mut self) -> Option<CloseCause> {
        self.end.try_recv().ok()
    }
}

fn shown(text: &str) -> String {
    let value: serde_json::Value = serde_json::from_str(text).unwrap();
    let part = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
    match value.get("removed_peer") {
        Some(address) => format!("-{}", address.as_str().unwrap()),
        None => format!("+{} {}{}", part("display_name"), part("virtual_ip"), part("endpoint")),
    }
}

#[test]
fn members_learn_of_each_other_once_and_not_of_themselves() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let [mut a, mut b, mut c] = [2, 3, 4].map(|number| rig.join(number));
    let mut other = rig.join_in("T", 2, Form::default(), 100);
    assert_eq!(a.received(), ["10.64.0.1: ", "+N3 10.64.0.2", "+N4 10.64.0.3"]);
    assert_eq!(b.received(), ["10.64.0.2: N2", "+N4 10.64.0.3"]);
    assert_eq!(c.received(), ["10.64.0.3: N2 N3"]);
    assert_eq!(other.received(), ["10.64.16.1: "]);
    rig.leave(&b);
    rig.leave(&b);
    assert_eq!((a.received(), c.received()), (vec!["-10.64.0.2".to_owned()], vec!["-10.64.0.2".to_owned()]));
    assert_eq!((b.received(), other.received(), rig.members()), (vec![], vec![], 3));
    let (mut d, mut again) = (rig.join(5), rig.join(3));
    assert_eq!(d.received(), ["10.64.0.4: N2 N4", "+N3 10.64.0.2"]);
    assert_eq!(again.received(), ["10.64.0.2: N2 N4 N5"]);
    rig.leave(&a);
    let (_first, mut last) = (rig.join(2), rig.join(6));
    assert_eq!(last.received(), ["10.64.0.5: N4 N5 N3 N2"], "in the order of their joins");
}

#[test]
fn endpoints_are_shown_to_members_that_show_theirs() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, mut b) = (rig.join(2), rig.join_in("t", 3, Form { endpoints: true, ..Form::default() }, 100));
    let _c = rig.join_in("t", 4, Form { endpoints: true, ..Form::default() }, 100);
    assert_eq!(a.received(), ["10.64.0.1: ", "+N3 10.64.0.2", "+N4 10.64.0.3"]);
    assert_eq!(b.received(), ["10.64.0.2: N2", "+N4 10.64.0.3192.0.2.4"]);
}

#[test]
fn a_member_that_does_not_read_is_dropped_and_announced() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, mut slow) = (rig.join(2), rig.join_in("t", 3, Form::default(), 2));
    assert_eq!(a.received(), ["10.64.0.1: ", "+N3 10.64.0.2"]);
    let mut others = [rig.join(4), rig.join(5)];
    assert_eq!(slow.end(), Some(CloseCause::Slow));
    assert_eq!(a.received(), ["+N4 10.64.0.3", "+N5 10.64.0.4", "-10.64.0.2"]);
    assert_eq!(others.each_mut().map(Guest::received)[1], ["10.64.0.4: N2 N3 N4", "-10.64.0.2"]);
    assert_eq!(rig.members(), 3);
    rig.leave(&slow);
    assert!(a.received().is_empty());

    let full: Vec<_> = (10..200).map(|number| rig.join_in("full", number, Form::default(), 1000)).collect();
    let mut tight: Vec<_> = (200..250).map(|number| rig.join_in("full", number, Form::default(), 1)).collect();
    assert!(
        tight.iter_mut().all(|guest| guest.end() == Some(CloseCause::Slow)),
        "the last one by the removal of another"
    );
    assert_eq!(rig.members(), 3 + full.len());
}

#[test]
fn a_member_that_has_closed_is_not_taken_for_a_slow_one() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, mut b) = (rig.join(2), rig.join(3));
    a.received();
    b.queue.close();
    let _c = rig.join(4);
    assert_eq!((a.received(), b.end()), (vec!["+N4 10.64.0.3".to_owned()], None));
    assert_eq!(rig.brokers[0].tenants.metrics.leaves.with_label_values(&["slow"]).get(), 0);
    rig.leave(&b);
    assert_eq!(a.received(), ["-10.64.0.2"]);
}

#[test]
fn a_key_that_a_living_member_has_is_refused_without_a_message_to_others() {
    for brokers in [1, 2] {
        let mut rig = Rig::of(brokers);
        let last = rig.brokers.len() - 1;
        let (mut a, mut b) = (rig.enter(0, 2), rig.enter(last, 3));
        a.received();
        let mut twin = rig.enter(0, 3);
        assert_eq!((b.received(), twin.end()), (vec!["10.64.0.2: N2".to_owned(), "?".into()], None));
        rig.alive(&b);
        assert_eq!((twin.end(), twin.received()), (Some(CloseCause::KeyInUse), vec![]));
        rig.wait(2 * PROBE_TIMEOUT);
        assert_eq!((a.received(), b.received(), b.end()), (vec![], vec![], None));

        let gone = rig.enter(0, 3);
        rig.leave(&gone);
        rig.wait(PROBE_TIMEOUT);
        assert_eq!(b.end(), Some(CloseCause::Silent), "it did not answer, whoever asked");
        assert_eq!((a.received(), rig.members()), (vec!["-10.64.0.2".to_owned()], 1));
    }
}

#[test]
fn a_member_is_asked_whether_it_is_alive_though_its_queue_is_full() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    // There is room for its answer.
    let mut full = rig.join_in("t", 3, Form::default(), 1);
    let mut twin = rig.join(3);
    assert_eq!((full.end(), full.received()), (None, vec!["10.64.0.1: ".to_owned(), "?".into()]));
    rig.alive(&full);
    assert_eq!((twin.end(), rig.members()), (Some(CloseCause::KeyInUse), 1));
}

#[test]
fn a_member_that_does_not_answer_gives_its_address_to_one_of_those_with_its_key() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, mut silent) = (rig.join(2), rig.join(3));
    a.received();
    let mut ten: Vec<_> = (0..10).map(|_| rig.join(3)).collect();
    assert_eq!(silent.received(), ["10.64.0.2: N2", "?"]);
    rig.wait(PROBE_TIMEOUT / 2);
    assert_eq!((a.received(), silent.end()), (vec![], None));
    rig.wait(PROBE_TIMEOUT / 2);
    assert_eq!(silent.end(), Some(CloseCause::Silent));
    assert_eq!(a.received(), ["-10.64.0.2", "+N3 10.64.0.2"]);
    assert_eq!(ten[0].received(), ["10.64.0.2: N2", "?"], "the others ask for it, too");
    rig.alive(&ten[0]);
    assert!(ten[1..].iter_mut().all(|guest| guest.end() == Some(CloseCause::KeyInUse)));
    assert_eq!((rig.members(), a.received()), (2, vec![]));
}

#[test]
fn the_successor_of_a_member_has_its_address_also_where_none_is_held() {
    let now = Instant::now();
    let mut broker = new_broker(0, "10.64.0.0/10", 20, Addresses::new(), now);
    broker.tenants.settings.grace = Duration::ZERO;
    let mut rig = Rig::with(broker, now);
    rig.wait(Duration::from_secs(5));
    let (a, mut b, mut silent) = (rig.join(2), rig.join(3), rig.join(4));
    rig.leave(&a);
    assert_eq!(b.received().last().map(String::as_str), Some("-10.64.0.1"), "a lower one is free");
    let mut twin = rig.join(4);
    rig.wait(PROBE_TIMEOUT);
    assert_eq!(silent.end(), Some(CloseCause::Silent));
    assert_eq!(b.received(), ["-10.64.0.3", "+N4 10.64.0.3"]);
    assert_eq!(twin.received(), ["10.64.0.3: N3"]);
    let mut next = rig.join(4);
    rig.leave(&twin);
    assert_eq!((next.received(), rig.members()), (vec!["10.64.0.3: N3".to_owned()], 2));
    assert_eq!(rig.brokers[0].tenants.sessions.addresses().len(), 2);
}

#[test]
fn a_member_that_leaves_while_it_is_asked_makes_room_at_once() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, b) = (rig.join(2), rig.join(3));
    let mut twin = rig.join(3);
    a.received();
    rig.leave(&b);
    assert_eq!(a.received(), ["-10.64.0.2", "+N3 10.64.0.2"]);
    assert_eq!(twin.received(), ["10.64.0.2: N2"]);
}

#[test]
fn a_refused_member_takes_nothing() {
    let mut rig = Rig::new("10.0.0.0/28", 28);
    let mut all: Vec<_> = (2..16).map(|number| rig.join(number)).collect();
    assert_eq!(all[13].received().len(), 1);
    for _ in 0..100 {
        assert_eq!(rig.join(99).end(), Some(CloseCause::NoAddress));
        assert_eq!(rig.join_in("u", 2, Form::default(), 1).end(), Some(CloseCause::NoNetwork));
    }
    assert!(all[13].received().is_empty());
    rig.leave(&all[3]);
    assert_eq!(rig.join(99).received()[0].split(':').next(), Some("10.0.0.4"), "the one that is held goes");
    assert_eq!(rig.members(), 14);
}

#[test]
fn a_client_that_has_sessions_in_too_many_tenants_gets_no_further_one() {
    let mut rig = Rig::new("10.0.0.0/22", 28);
    rig.client = Client::from(IpAddr::from([192, 0, 2, 1]));
    // The one in tenant 1 has no room for more than its answer.
    let join = |rig: &mut Rig, tenant: usize| {
        rig.join_in(&tenant.to_string(), 2, Form::default(), if tenant == 1 { 1 } else { 10 })
    };
    let mut all: Vec<_> = (0..32).map(|tenant| join(&mut rig, tenant)).collect();
    assert_eq!(all[31].received().len(), 1);
    for tenant in 32..200 {
        assert_eq!(join(&mut rig, tenant).end(), Some(CloseCause::TooManyTenants));
    }
    assert_eq!(rig.join_in("7", 3, Form::default(), 10).received().len(), 1, "it is in this one");
    rig.client = Client::from(IpAddr::from([192, 0, 2, 2]));
    assert_eq!(join(&mut rig, 32).received().len(), 1);
    rig.client = Client::from(IpAddr::from([192, 0, 2, 1]));
    rig.leave(&all[0]);
    assert_eq!(join(&mut rig, 33).received().len(), 1);
    // One that was dropped does not count any more either.
    rig.client = Client::Local;
    assert_eq!((rig.join_in("1", 4, Form::default(), 1).received().len(), all[1].end()), (1, Some(CloseCause::Slow)));
    rig.client = Client::from(IpAddr::from([192, 0, 2, 1]));
    assert_eq!(join(&mut rig, 34).received().len(), 1);
    assert_eq!(join(&mut rig, 35).end(), Some(CloseCause::TooManyTenants));
}

#[test]
fn a_session_that_is_over_before_its_join_is_none() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let mut a = rig.join(2);
    let (sender, queue) = mpsc::channel(1);
    drop(queue);
    let (probes, end) = (mpsc::channel(1).0, oneshot::channel().0);
    let link = SessionLink { client: Client::Local, form: Form::default(), queue: sender, probes, end };
    let public_key = PublicKey::from_bytes([9; 32]).unwrap();
    let client = MemberInfo { display_name: String::new(), public_key, endpoint: None };
    let join_request = JoinRequest { session: SessionId(99), tenant: TenantId::new("t").unwrap(), client };
    rig.brokers[0].tenants.join(join_request, link, rig.now);
    assert_eq!((rig.members(), a.received().len()), (1, 1));
}

#[test]
fn when_the_broker_stops_each_session_is_ended_and_addresses_stay_kept() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, mut b) = (rig.join(2), rig.join(3));
    let mut twin = rig.join(3);
    let Broker { tenants, kept, .. } = rig.brokers.remove(0);
    tenants.stop(rig.now);
    assert!([&mut a, &mut b, &mut twin].map(Guest::end).iter().all(|end| *end == Some(CloseCause::Stopping)));
    assert_eq!((a.received().len(), b.received()), (2, vec!["10.64.0.2: N2".to_owned(), "?".into()]), "and no leave");
    let changes = kept.take();
    assert_eq!(changes.len(), 2);
    assert!(changes.values().all(Option::is_some));
}

#[test]
fn a_new_database_gets_all_addresses() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (_a, b) = (rig.join(2), rig.join(3));
    rig.leave(&b);
    let Broker { tenants, kept, .. } = &rig.brokers[0];
    assert_eq!(kept.take().len(), 2);
    assert!(kept.is_empty());
    tenants.write_all();
    assert_eq!(kept.take().values().filter(|address| address.is_some()).count(), 2);
}

#[test]
fn addresses_of_the_disk_are_held_and_those_that_do_not_fit_are_given_up() {
    let now = Instant::now();
    let entry = |number: u8, address: &str| {
        (
            (TenantId::new("t").unwrap(), PublicKey::from_bytes([number; 32]).unwrap()),
            address.parse::<IpAddr>().unwrap(),
        )
    };
    let addresses = [entry(2, "10.64.0.7"), entry(3, "192.0.2.1"), entry(4, "10.64.0.0")].into();
    let mut rig = Rig::with(new_broker(0, "10.64.0.0/10", 20, addresses, now), now);
    rig.wait(Duration::from_secs(2));
    let mut early = rig.join(2);
    assert_eq!(early.received(), Vec::<String>::new(), "it is not known yet who gives addresses");
    rig.wait(Duration::from_secs(3));
    assert_eq!(early.received(), ["10.64.0.7: "]);
    assert_eq!(rig.join(3).received(), ["10.64.0.1: N2"]);
    let changes = rig.brokers[0].kept.take();
    assert_eq!(changes.iter().filter(|(_, address)| address.is_none()).count(), 1, "{changes:?}");
}

#[test]
fn members_at_different_brokers_see_each_other_as_at_one() {
    let mut rig = Rig::of(3);
    assert_eq!(rig.coordinators(), [0]);
    let (mut a, mut b, mut c) = (rig.enter(1, 2), rig.enter(2, 3), rig.enter(0, 4));
    assert_eq!(a.received(), ["10.64.0.1: ", "+N3 10.64.0.2", "+N4 10.64.0.3"]);
    assert_eq!(b.received(), ["10.64.0.2: N2", "+N4 10.64.0.3"]);
    assert_eq!(c.received(), ["10.64.0.3: N2 N3"]);
    rig.leave(&b);
    assert_eq!((a.received(), c.received()), (vec!["-10.64.0.2".to_owned()], vec!["-10.64.0.2".to_owned()]));
    let mut again = rig.enter(0, 3);
    assert_eq!(again.received(), ["10.64.0.2: N2 N4"], "its address was held");
    assert_eq!(rig.members(), 3);
    let addresses: Vec<_> = rig.brokers.iter().map(|broker| broker.tenants.sessions.addresses().clone()).collect();
    assert!(addresses.iter().all(|known| *known == addresses[0]));
}

#[test]
fn the_death_of_a_broker_is_the_leave_of_its_members_and_another_gives_addresses() {
    for dead in [0, 1] {
        let mut rig = Rig::of(3);
        let (mut a, mut b, mut c) = (rig.enter(0, 2), rig.enter(1, 3), rig.enter(2, 4));
        for guest in [&mut a, &mut b, &mut c] {
            guest.received();
        }
        rig.kill(dead);
        rig.wait(Duration::from_secs(20));
        assert_eq!(rig.coordinators(), [0, 1], "the dead one is by itself");
        let (gone, left) = if dead == 0 { ("10.64.0.1", [&mut b, &mut c]) } else { ("10.64.0.2", [&mut a, &mut c]) };
        let [first, second] = left;
        assert_eq!((first.received(), second.received()), (vec![format!("-{gone}")], vec![format!("-{gone}")]));
        let mut new = rig.enter(2, 9);
        assert_eq!(new.received()[0].split(':').next(), Some("10.64.0.4"), "the address of the dead is held");
        assert_eq!((first.received(), second.received()), (vec!["+N9 10.64.0.4".into()], vec!["+N9 10.64.0.4".into()]));
        let back = rig.enter(2, if dead == 0 { 2 } else { 3 }).received();
        assert_eq!(back[0].split(':').next(), Some(gone));
    }
}

#[test]
fn brokers_that_lost_each_other_serve_on_and_come_together_again() {
    let mut rig = Rig::of(2);
    let (mut a, mut b) = (rig.enter(0, 2), rig.enter(1, 3));
    rig.reach(1, false);
    rig.wait(Duration::from_secs(30));
    assert_eq!(rig.coordinators(), [0, 1]);
    assert_eq!(a.received(), ["10.64.0.1: ", "+N3 10.64.0.2", "-10.64.0.2"]);
    assert_eq!(b.received(), ["10.64.0.2: N2", "-10.64.0.1"]);
    // Each gives the same address to another one.
    let (mut c, mut d) = (rig.enter(0, 4), rig.enter(1, 5));
    assert_eq!((c.received(), d.received()), (vec!["10.64.0.3: N2".to_owned()], vec!["10.64.0.3: N3".to_owned()]));
    rig.reach(1, true);
    rig.wait(Duration::from_secs(5));
    assert_eq!(rig.coordinators(), [0]);
    assert_eq!(d.end(), Some(CloseCause::Conflict));
    assert_eq!((b.end(), c.end(), rig.members()), (None, None, 3));
    assert_eq!(a.received(), ["+N4 10.64.0.3", "+N3 10.64.0.2"]);
    assert_eq!(b.received(), ["+N5 10.64.0.3", "-10.64.0.3", "+N2 10.64.0.1", "+N4 10.64.0.3"]);
    assert_eq!(rig.enter(1, 5).received(), ["10.64.0.4: N3 N2 N4"]);
}

#[test]
fn a_broker_that_is_away_for_a_moment_costs_no_member() {
    for away in [0, 1] {
        let mut rig = Rig::of(2);
        let (mut a, mut b) = (rig.enter(0, 2), rig.enter(1, 3));
        a.received();
        b.received();
        rig.reach(away, false);
        rig.wait(Duration::from_secs(2));
        let mut late = rig.join_at(1 - away, "t", 4, Form::default(), 10);
        rig.reach(away, true);
        rig.wait(Duration::from_secs(16));
        assert_eq!((a.received(), b.received()), (vec!["+N4 10.64.0.3".to_owned()], vec!["+N4 10.64.0.3".to_owned()]));
        assert_eq!((late.received(), rig.members()), (vec!["10.64.0.3: N2 N3".to_owned()], 3));
    }
}

#[test]
fn a_probe_reaches_a_member_whose_broker_registers_again() {
    let mut rig = Rig::of(2);
    let mut held = rig.enter(1, 3);
    held.received();
    let mut twin = rig.join_at(0, "t", 3, Form::default(), 10);
    // The frame with the probe is lost, and the next one shows the gap.
    rig.deliver_some(|| false);
    assert_eq!(held.received(), Vec::<String>::new());
    let _other = rig.join_at(0, "u", 9, Form::default(), 10);
    rig.now += Duration::from_secs(1);
    rig.deliver();
    assert_eq!(held.received(), ["?"]);
    rig.alive(&held);
    assert_eq!((twin.end(), held.end()), (Some(CloseCause::KeyInUse), None));
}

#[test]
fn a_silent_coordinator_is_passed_over() {
    let mut rig = Rig::of(1);
    let (silent, announced) = ("a".parse::<BrokerName>().unwrap(), ServiceAnnouncement { since: 0, rules: "r".into() });
    let election = rig.brokers[0].tenants.election();
    election.on_bus(true, rig.now);
    election.on_hello(silent.clone(), Some(announced.clone()), rig.now);
    election.on_status(silent.clone(), true, rig.now);
    rig.wait(Duration::from_secs(20));
    assert_eq!(rig.coordinators(), Vec::<usize>::new());
    rig.wait(Duration::from_secs(20));
    assert_eq!(rig.coordinators(), [0]);
    assert_eq!(rig.join(2).received(), ["10.64.0.1: "]);
    let election = rig.brokers[0].tenants.election();
    election.on_hello(silent, Some(ServiceAnnouncement { since: 1, ..announced }), rig.now);
    rig.wait(Duration::from_secs(1));
    assert_eq!(rig.coordinators(), [0], "one that was started again comes later");
}

#[test]
fn a_coordinator_that_stood_still_follows_the_one_that_took_its_place() {
    let mut rig = Rig::of(3);
    let (mut a, mut b) = (rig.enter(0, 2), rig.enter(1, 3));
    // The bus still counts it as online.
    rig.brokers[0].is_reached = false;
    for _ in 0..45 {
        rig.now += Duration::from_secs(1);
        let now = rig.now;
        rig.brokers[1..].iter_mut().for_each(|broker| broker.tenants.tick(now));
        rig.deliver();
    }
    assert_eq!(rig.coordinators(), [0, 1]);
    assert_eq!(b.received(), ["10.64.0.2: N2", "-10.64.0.1"]);
    rig.brokers[0].is_reached = true;
    rig.tick();
    rig.introduce();
    rig.wait(Duration::from_secs(5));
    assert_eq!(rig.coordinators(), [1]);
    let mut c = rig.enter(2, 4);
    assert_eq!((c.received(), rig.members()), (vec!["10.64.0.3: N3 N2".to_owned()], 3));
    assert_eq!((a.end(), b.end()), (None, None));
    assert_eq!(a.received().last().map(String::as_str), Some("+N4 10.64.0.3"));
}

#[test]
fn joins_wait_while_the_coordinator_is_cut_off_for_a_moment() {
    let mut rig = Rig::of(2);
    rig.reach(0, false);
    rig.tick();
    let mut guest = rig.join(3);
    rig.wait(Duration::from_secs(2));
    assert_eq!(guest.received(), Vec::<String>::new(), "the other one may give addresses soon");
    rig.reach(0, true);
    rig.wait(Duration::from_secs(1));
    assert_eq!(guest.received(), ["10.64.0.1: "]);
    // For longer: each serves by itself.
    rig.reach(0, false);
    rig.wait(Duration::from_secs(11));
    let (mut first, mut second) = (rig.enter(0, 4), rig.enter(1, 5));
    assert_eq!((first.received().len(), second.received().len()), (1, 1));
}

#[test]
fn a_join_without_a_coordinator_ends_with_a_reason() {
    let mut rig = Rig::of(2);
    rig.brokers[0].is_reached = false;
    let mut guest = rig.enter(1, 2);
    rig.wait(Duration::from_secs(4));
    assert_eq!(guest.end(), None);
    rig.wait(Duration::from_secs(1));
    assert_eq!(guest.end(), Some(CloseCause::Late));
}

#[test]
fn whoever_comes_third_with_a_key_is_refused_in_time() {
    for second_is_alive in [true, false] {
        for third_broker in [0, 1] {
            let mut rig = Rig::of(2);
            let mut silent = rig.enter(0, 3);
            let mut second = rig.enter(1, 3);
            rig.wait(Duration::from_secs(2));
            let mut third = rig.enter(third_broker, 3);
            rig.wait(Duration::from_secs(2));
            assert_eq!(silent.end(), Some(CloseCause::Silent));
            assert_eq!((second.received(), third.end()), (vec!["10.64.0.1: ".to_owned(), "?".into()], None));
            if second_is_alive {
                rig.alive(&second);
            } else {
                rig.wait(Duration::from_secs(3));
            }
            let expected = if second_is_alive { CloseCause::KeyInUse } else { CloseCause::Late };
            assert_eq!((third.end(), third.received()), (Some(expected), vec![]));
        }
    }
}

#[test]
fn while_the_coordinator_is_replaced_a_join_ends_in_time_or_gets_an_address() {
    let mut rig = Rig::of(3);
    let (_a, _b) = (rig.enter(0, 2), rig.enter(1, 3));
    rig.kill(0);
    let mut joining: Vec<_> = Vec::new();
    for number in 10..24 {
        joining.push((rig.now, rig.join_at(2, "t", number, Form::default(), 100)));
        rig.wait(Duration::from_secs(1));
        let (now, mut outcomes) = (rig.now, Vec::new());
        joining.retain_mut(|(since, guest)| {
            let (received, end) = (guest.received(), guest.end());
            outcomes.extend(end.clone());
            assert!(!received.is_empty() || end.is_some() || now - *since < Duration::from_secs(5));
            received.is_empty() && end.is_none()
        });
        assert!(outcomes.iter().all(|end| *end == CloseCause::Late), "{outcomes:?}");
    }
    assert!(joining.is_empty(), "the next one gives addresses");
    assert_eq!(rig.enter(2, 30).end(), None);
}

#[test]
fn a_join_waits_for_a_member_that_is_asked_however_many_ask() {
    let mut rig = Rig::of(2);
    let _silent = rig.enter(0, 3);
    let mut twin = rig.enter(1, 3);
    rig.wait(PROBE_TIMEOUT);
    assert_eq!((twin.received(), twin.end()), (vec!["10.64.0.1: ".to_owned()], None));
}

#[test]
fn a_broker_whose_registration_is_long_keeps_its_members() {
    let mut rig = Rig::of(3);
    let (mut watcher, member) = (rig.enter(1, 2), rig.enter(2, 3));
    assert_eq!(watcher.received(), ["10.64.0.1: ", "+N3 10.64.0.2"]);
    rig.kill(0);
    // This test sends its registration, a frame a second.
    rig.brokers[member.broker].is_reached = false;
    rig.wait(Duration::from_secs(5));
    let held = |number: u8| HeldAddress {
        tenant: TenantId::new("u").unwrap(),
        key: PublicKey::from_bytes([number; 32]).unwrap(),
        address: [10, 64, 16, number].into(),
    };
    for number in 0..15 {
        let requests =
            vec![if number == 0 { CoordinatorRequest::Register } else { CoordinatorRequest::Held(held(number + 1)) }];
        let (from, number) = (rig.brokers[member.broker].name.clone(), number.into());
        let frame = Frame { from, epoch: 99_999, number, content: FrameContent::Requests(requests) };
        rig.brokers[1].tenants.on_frame(frame, rig.now);
        rig.wait(Duration::from_secs(1));
    }
    assert_eq!(watcher.received(), Vec::<String>::new());
    rig.wait(FRAME_SILENCE_TIMEOUT);
    assert_eq!(watcher.received(), ["-10.64.0.2"], "it does not end");
}

#[derive(Debug, Clone)]
enum Step {
    Join { broker: usize, number: u8 },
    Leave(u8),
    Lose(usize),
    Reach(usize),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..3_usize, 2..20_u8).prop_map(|(broker, number)| Step::Join { broker, number }),
        4 => (2..20_u8).prop_map(Step::Leave),
        1 => (0..3_usize).prop_map(Step::Lose),
        2 => (0..3_usize).prop_map(Step::Reach),
        2 => (1..20_u64).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    /// Whatever brokers lose each other, and whatever frames are lost: in the end all members know all others once.
    #[test]
    fn members_of_all_brokers_come_to_know_the_same(steps in steps(), losses in prop::collection::vec(any::<bool>(), 0..40)) {
        let mut rig = Rig::of(3);
        let mut losses = losses.into_iter();
        // By number: the guest, and the members that it knows.
        let mut guests: BTreeMap<u8, (Guest, BTreeMap<String, String>)> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Join { broker, number } if !guests.contains_key(&number) => {
                    let guest = rig.join_at(broker, "t", number, Form::default(), 1000);
                    guests.insert(number, (guest, BTreeMap::new()));
                }
                Step::Leave(number) => if let Some((guest, _)) = guests.remove(&number) {
                    rig.brokers[guest.broker].tenants.leave(guest.session, Leave::Closed, rig.now);
                },
                Step::Lose(broker) => rig.reach(broker, false),
                Step::Reach(broker) => rig.reach(broker, true),
                Step::Wait(seconds) => rig.wait(Duration::from_secs(seconds)),
                Step::Join { .. } => {}
            }
            rig.deliver_some(|| !losses.next().unwrap_or_default());
            check(&mut rig, &mut guests)?;
        }
        (0..3).for_each(|broker| rig.reach(broker, true));
        rig.wait(Duration::from_secs(40));
        check(&mut rig, &mut guests)?;
        let truth: BTreeMap<_, _> = guests.iter().map(|(number, (_, known))| (known["own"].clone(), format!("N{number}"))).collect();
        prop_assert_eq!((truth.len(), rig.members()), (guests.len(), guests.len()));
        for (guest, known) in guests.values() {
            let mut expected = truth.clone();
            expected.remove(&known["own"]);
            let mut known = known.clone();
            known.remove("own");
            prop_assert_eq!(known, expected, "{:?}", guest.session);
        }
    }
}

/// Applies the messages that guests received, as clients do. Those that were ended are gone.
fn check(rig: &mut Rig, guests: &mut BTreeMap<u8, (Guest, BTreeMap<String, String>)>) -> Result<(), TestCaseError> {
    for (guest, known) in guests.values_mut() {
        while let Ok(outgoing) = guest.queue.try_recv() {
            match outgoing {
                Outgoing::Answer(welcome) => {
                    let Welcome { virtual_ip: own, peers, .. } = *welcome;
                    prop_assert!(known.is_empty(), "{own} again");
                    let entry = |peer: &Arc<Member>| (peer.virtual_ip.to_string(), peer.client.display_name.clone());
                    known.extend(peers.iter().map(entry));
                    prop_assert!(
                        known.insert("own".into(), own.to_string()).is_none() && !known.contains_key(&own.to_string())
                    );
                }
                Outgoing::Text(text) => {
                    let message = shown(&text);
                    if let Some(address) = message.strip_prefix('-') {
                        prop_assert!(known.remove(address).is_some(), "{message}");
                    } else if let Some((name, address)) = message[1..].split_once(' ') {
                        prop_assert!(known["own"] != address, "{message}");
                        prop_assert!(known.insert(address.into(), name.into()).is_none(), "{message} again");
                    }
                }
            }
        }
        if guest.probes.try_recv().is_ok() {
            rig.brokers[guest.broker].tenants.alive(guest.session, rig.now);
        }
    }
    guests.retain(|_, (guest, _)| guest.end().is_none());
    Ok(())
}
