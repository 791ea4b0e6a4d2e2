use ipnet::IpNet;
use wgkex_common::PublicKey;

use super::*;
use crate::metrics::Registry;

const GRACE: Duration = Duration::from_secs(60);

/// The service with a clock that is moved by hand, and sessions that are only channels.
struct Rig {
    service: TenantService,
    _handle: TenantsHandle,
    now: Instant,
    last: u64,
}

/// A session that wants to be a member.
struct Guest {
    session: SessionId,
    queue: mpsc::Receiver<Outgoing>,
    end: oneshot::Receiver<CloseCause>,
}

impl Rig {
    fn new(pool: &str, length: u8) -> Self {
        let pool: IpNet = pool.parse().unwrap();
        let metrics = Metrics::register(&Registry::default()).unwrap();
        let tenants = Tenants::new(&[pool], length, GRACE);
        let (service, handle) = TenantService::new(tenants, AddressBuffer::default(), metrics);
        Self { service, _handle: handle, now: Instant::now(), last: 0 }
    }

    fn do_it(&mut self, command: Command) {
        self.service.on_command(command, self.now);
    }

    fn join_in(&mut self, tenant: &str, number: u8, form: Form, room: usize) -> Guest {
        self.last += 1;
        let session = SessionId(self.last);
        let (sender, queue) = mpsc::channel(room);
        let (ended, end) = oneshot::channel();
        let public_key = PublicKey::from_bytes([number; 32]).unwrap();
        let endpoint = (form == Form::WithEndpoints).then(|| [192, 0, 2, number].into());
        let client = Newcomer { display_name: format!("N{number}"), public_key, endpoint };
        let link = SessionLink { form, queue: sender, end: ended };
        let tenant = TenantId::new(tenant).unwrap();
        self.do_it(Command::Join(Box::new(JoinRequest { session, tenant, client, link })));
        Guest { session, queue, end }
    }

    fn join(&mut self, number: u8) -> Guest {
        self.join_in("t", number, Form::Plain, 100)
    }

    fn leave(&mut self, guest: &Guest) {
        self.do_it(Command::Leave(guest.session, Leave::Closed));
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.service.tick(self.now);
    }

    fn members(&self) -> usize {
        assert_eq!(self.service.members.len(), self.service.tenants.counts().members);
        self.service.members.len()
    }
}

impl Guest {
    /// What came since the last time: `ADDRESS: NAMES` for an answer, `+NAME ADDRESS`, `-ADDRESS`, `?` for a probe.
    fn received(&mut self) -> Vec<String> {
        let mut received = Vec::new();
        while let Ok(outgoing) = self.queue.try_recv() {
            received.push(match outgoing {
                Outgoing::Answer(address, peers) => {
                    let names: Vec<_> = peers.iter().map(|peer| peer.client.display_name.as_str()).collect();
                    format!("{address}: {}", names.join(" "))
                }
                Outgoing::Text(text) => shown(&text),
                Outgoing::Probe => "?".into(),
            });
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
    let mut other = rig.join_in("T", 2, Form::Plain, 100);
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
}

#[test]
fn endpoints_are_shown_to_those_who_show_theirs() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, mut b) = (rig.join(2), rig.join_in("t", 3, Form::WithEndpoints, 100));
    let _c = rig.join_in("t", 4, Form::WithEndpoints, 100);
    assert_eq!(a.received(), ["10.64.0.1: ", "+N3 10.64.0.2", "+N4 10.64.0.3"]);
    assert_eq!(b.received(), ["10.64.0.2: N2", "+N4 10.64.0.3192.0.2.4"]);
}

#[test]
fn a_member_that_does_not_read_is_dropped_and_announced() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, mut slow) = (rig.join(2), rig.join_in("t", 3, Form::Plain, 2));
    assert_eq!(a.received(), ["10.64.0.1: ", "+N3 10.64.0.2"]);
    let mut others = [rig.join(4), rig.join(5)];
    assert_eq!(slow.end(), Some(CloseCause::Slow));
    assert_eq!(a.received(), ["+N4 10.64.0.3", "+N5 10.64.0.4", "-10.64.0.2"]);
    assert_eq!(others.each_mut().map(Guest::received)[1], ["10.64.0.4: N2 N3 N4", "-10.64.0.2"]);
    assert_eq!(rig.members(), 3);
    rig.leave(&slow);
    assert!(a.received().is_empty());

    let full: Vec<_> = (10..200).map(|number| rig.join_in("full", number, Form::Plain, 1000)).collect();
    let mut tight: Vec<_> = (200..250).map(|number| rig.join_in("full", number, Form::Plain, 1)).collect();
    assert!(
        tight.iter_mut().all(|guest| guest.end() == Some(CloseCause::Slow)),
        "the last one by the removal of another"
    );
    assert_eq!(rig.members(), 3 + full.len());
}

#[test]
fn a_key_that_a_living_member_has_is_refused_and_nobody_learns_of_it() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, mut b) = (rig.join(2), rig.join(3));
    a.received();
    let mut twin = rig.join(3);
    assert_eq!((b.received(), twin.end()), (vec!["10.64.0.2: N2".to_owned(), "?".into()], None));
    rig.do_it(Command::Alive(b.session));
    assert_eq!((twin.end(), twin.received()), (Some(CloseCause::KeyInUse), vec![]));
    rig.wait(2 * PROBE_TIMEOUT);
    assert_eq!((a.received(), b.received(), b.end()), (vec![], vec![], None));

    let gone = rig.join(3);
    rig.leave(&gone);
    rig.wait(PROBE_TIMEOUT);
    assert_eq!(b.end(), Some(CloseCause::Silent), "it did not answer, whoever asked");
    assert_eq!((a.received(), rig.members()), (vec!["-10.64.0.2".to_owned()], 1));
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
    rig.do_it(Command::Alive(ten[0].session));
    assert!(ten[1..].iter_mut().all(|guest| guest.end() == Some(CloseCause::KeyInUse)));
    assert_eq!((rig.members(), a.received()), (2, vec![]));
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
fn who_is_refused_takes_nothing() {
    let mut rig = Rig::new("10.0.0.0/28", 28);
    let mut all: Vec<_> = (2..16).map(|number| rig.join(number)).collect();
    assert_eq!(all[13].received().len(), 1);
    for _ in 0..100 {
        assert_eq!(rig.join(99).end(), Some(CloseCause::NoAddress));
        assert_eq!(rig.join_in("u", 2, Form::Plain, 1).end(), Some(CloseCause::NoNetwork));
    }
    assert!(all[13].received().is_empty());
    rig.leave(&all[3]);
    assert_eq!(rig.join(99).received()[0].split(':').next(), Some("10.0.0.4"), "the one that is held goes");
    assert_eq!(rig.members(), 14);
}

#[test]
fn a_session_that_is_over_before_its_join_is_none() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let mut a = rig.join(2);
    let (sender, queue) = mpsc::channel(1);
    drop(queue);
    let link = SessionLink { form: Form::Plain, queue: sender, end: oneshot::channel().0 };
    let public_key = PublicKey::from_bytes([9; 32]).unwrap();
    let client = Newcomer { display_name: String::new(), public_key, endpoint: None };
    let request = JoinRequest { session: SessionId(99), tenant: TenantId::new("t").unwrap(), client, link };
    rig.do_it(Command::Join(Box::new(request)));
    assert_eq!((rig.members(), a.received().len()), (1, 1));
}

#[tokio::test]
async fn when_the_broker_stops_each_session_is_ended_and_addresses_stay_kept() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (mut a, mut b) = (rig.join(2), rig.join(3));
    let mut twin = rig.join(3);
    let kept = rig.service.kept.clone();
    rig.service.run(tokio::time::sleep(Duration::from_millis(1))).await;
    assert!([&mut a, &mut b, &mut twin].map(Guest::end).iter().all(|end| *end == Some(CloseCause::Stopping)));
    let changes = kept.take();
    assert_eq!(changes.len(), 2);
    assert!(changes.values().all(Option::is_some));
}

#[test]
fn a_new_database_gets_all_addresses() {
    let mut rig = Rig::new("10.64.0.0/10", 20);
    let (_a, b) = (rig.join(2), rig.join(3));
    rig.leave(&b);
    rig.service.keep_changes();
    assert_eq!(rig.service.kept.take().len(), 2);
    rig.service.keep_changes();
    assert!(rig.service.kept.is_empty());
    rig.service.kept.request_full_write();
    rig.service.keep_changes();
    assert_eq!(rig.service.kept.take().values().filter(|address| address.is_some()).count(), 2);
}
