use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn key(n: u8) -> PublicKey {
    PublicKey::from_bytes([n + 9; 32]).unwrap()
}

fn address(n: u8) -> IpAddr {
    IpAddr::from([10, 64, 0, n])
}

fn networks() -> TenantNetworks {
    TenantNetworks { pool: vec!["10.64.0.0/10".parse().unwrap()], tenant_length: 20 }
}

fn announced(endpoint: &str) -> AnnouncedHub {
    let endpoint_address = endpoint.to_owned();
    AnnouncedHub { public_key: key(200), endpoint_address, endpoint_port: 51830, networks: networks() }
}

fn worker() -> WorkerName {
    "gw1".parse().unwrap()
}

fn hub() -> TenantHub {
    let mut hub = TenantHub::new(worker(), networks());
    assert!(hub.on_announced(&worker(), Some(announced("gw1.example"))));
    hub.lead(7);
    hub
}

/// A worker's copy, and whether it has noticed that it is behind.
#[derive(Default)]
struct Copy {
    version: Option<LeaseVersion>,
    leases: BTreeMap<PublicKey, LeasedAddresses>,
    /// It would request all addresses.
    is_behind: bool,
}

impl Copy {
    fn apply(&mut self, messages: Vec<LeaseMessage>) {
        for LeaseMessage { server, version, content } in messages {
            assert_eq!(server, HUB);
            match content {
                LeaseContent::Change(LeaseChange { after, removed, added }) => {
                    if self.version != Some(LeaseVersion { revision: after, ..version }) {
                        self.is_behind = true;
                        continue;
                    }
                    self.leases.retain(|key, _| !removed.contains(key));
                    self.leases.extend(added);
                    self.version = Some(version);
                }
                LeaseContent::Chunk(chunk) => {
                    assert!(chunk.is_last && chunk.number == 0);
                    (self.version, self.leases, self.is_behind) = (Some(version), chunk.leases, false);
                }
                LeaseContent::Current => self.is_behind |= self.version != Some(version),
                LeaseContent::Deleted => panic!("it is never deleted"),
            }
        }
    }
}

#[test]
fn members_learn_of_the_hub_that_its_worker_announces() {
    let mut hub = TenantHub::new(worker(), networks());
    assert_eq!((hub.problem(), hub.peer(address(1))), (Some(HubProblem::Missing), None));
    assert!(!hub.on_announced(&"other".parse().unwrap(), Some(announced("x"))), "another gateway's is none");
    assert!(hub.on_announced(&worker(), Some(announced("2001:db8::1"))));
    assert!(!hub.on_announced(&worker(), Some(announced("2001:db8::1"))), "the same again");
    let peer = hub.peer("10.64.17.1".parse().unwrap()).unwrap();
    assert_eq!(
        (peer.endpoint.as_str(), peer.allowed_ips.to_string().as_str()),
        ("[2001:db8::1]:51830", "10.64.16.0/20")
    );
    assert_eq!(hub.peer("10.1.0.1".parse().unwrap()), None);
    let mut other = announced("gw1.example");
    other.networks.tenant_length = 24;
    assert!(hub.on_announced(&worker(), Some(other)));
    assert_eq!((hub.problem(), hub.peer(address(1))), (Some(HubProblem::OtherNetworks), None));
    assert!(!hub.on_announced(&worker(), None));
    assert_eq!(hub.problem(), Some(HubProblem::Missing));
}

#[test]
fn a_key_has_its_addresses_of_all_tenants_and_loses_only_one_of_them() {
    let now = Instant::now();
    let (mut hub, mut copy) = (hub(), Copy::default());
    hub.on_request(&worker(), None);
    copy.apply(hub.take_messages(now));
    let mut expect = |hub: &mut TenantHub, expected: Option<&[u8]>| {
        copy.apply(hub.take_messages(now));
        let leased = copy.leases.get(&key(1)).map(|addresses| addresses.iter().collect::<Vec<_>>());
        assert_eq!(leased, expected.map(|numbers| numbers.iter().map(|n| address(*n)).collect()));
        assert!(!copy.is_behind);
    };
    hub.on_address(key(1), None, Some(address(1)));
    expect(&mut hub, Some(&[1]));
    hub.on_address(key(1), None, Some(address(2)));
    expect(&mut hub, Some(&[1, 2]));
    hub.on_address(key(1), Some(address(1)), Some(address(3)));
    expect(&mut hub, Some(&[2, 3]));
    hub.on_address(key(1), Some(address(2)), None);
    expect(&mut hub, Some(&[3]));
    // Networks change hands: one tenant has the address before the other has lost it.
    hub.on_address(key(1), None, Some(address(3)));
    hub.on_address(key(1), Some(address(3)), Some(address(4)));
    expect(&mut hub, Some(&[3, 4]));
    hub.on_address(key(1), Some(address(3)), None);
    hub.on_address(key(1), Some(address(4)), None);
    expect(&mut hub, None);
}

#[test]
fn a_key_in_very_many_tenants_has_the_first_addresses() {
    let mut hub = hub();
    let addresses: Vec<_> = (0..=255).flat_map(|a| (0..4).map(move |b| IpAddr::from([10, 64, b, a]))).collect();
    for address in &addresses {
        hub.on_address(key(1), None, Some(*address));
    }
    hub.on_request(&worker(), None);
    let mut copy = Copy::default();
    copy.apply(hub.take_messages(Instant::now()));
    assert_eq!(copy.leases[&key(1)].iter().collect::<Vec<_>>(), addresses[..ADDRESSES_MAX]);
}

#[test]
fn messages_are_bounded_by_their_addresses() {
    let mut hub = hub();
    let addresses = |n: u8| (0..=255).map(move |last| IpAddr::from([10, 64, n, last]));
    for n in 0..5 {
        addresses(n).chain(addresses(n + 100)).for_each(|address| hub.on_address(key(n), None, Some(address)));
    }
    let sizes = |messages: Vec<LeaseMessage>| -> Vec<_> {
        let size = |leases: &BTreeMap<PublicKey, LeasedAddresses>| leases.values().map(|all| all.iter().count()).sum();
        let sizes = messages.iter().map(|message| match &message.content {
            LeaseContent::Change(change) => size(&change.added),
            LeaseContent::Chunk(chunk) => size(&chunk.leases),
            LeaseContent::Current | LeaseContent::Deleted => 0_usize,
        });
        sizes.collect()
    };
    assert_eq!(sizes(hub.take_messages(Instant::now())), [1024, 1024, 512]);
    hub.on_request(&worker(), None);
    assert_eq!(sizes(hub.take_messages(Instant::now())), [1024, 1024, 512]);
}

#[test]
fn a_broker_that_does_not_publish_keeps_no_changes() {
    let mut hub = hub();
    hub.follow();
    for n in 0..100 {
        hub.on_address(key(n), None, Some(address(n)));
        hub.on_address(key(n), Some(address(n)), None);
    }
    assert!(hub.changed.is_empty() && hub.addresses.is_empty() && hub.outgoing.is_empty());
}

#[test]
fn a_worker_that_missed_something_notices_it_within_seconds() {
    let start = Instant::now();
    let (mut hub, mut copy) = (hub(), Copy::default());
    copy.apply(hub.take_messages(start));
    assert!(copy.is_behind, "it is new");
    hub.on_request(&"other".parse().unwrap(), None);
    assert_eq!(hub.take_messages(start), [], "no other worker is answered");
    hub.on_request(&worker(), copy.version);
    copy.apply(hub.take_messages(start));
    hub.on_address(key(1), None, Some(address(1)));
    assert_eq!(hub.take_messages(start).len(), 1, "and that is lost");
    copy.apply(hub.take_messages(start + VERSION_INTERVAL / 2));
    assert!(!copy.is_behind);
    copy.apply(hub.take_messages(start + VERSION_INTERVAL));
    assert!(copy.is_behind);
    // Another coordinator has other numbers.
    hub.on_request(&worker(), copy.version);
    copy.apply(hub.take_messages(start + VERSION_INTERVAL));
    hub.follow();
    hub.on_address(key(2), None, Some(address(2)));
    assert_eq!(hub.take_messages(start + 3 * VERSION_INTERVAL), []);
    hub.lead(8);
    copy.apply(hub.take_messages(start + 3 * VERSION_INTERVAL));
    assert!(copy.is_behind);
    hub.on_request(&worker(), copy.version);
    copy.apply(hub.take_messages(start + 3 * VERSION_INTERVAL));
    assert_eq!(copy.leases.len(), 2);
    // Without a worker that is the hub, nothing is sent, and nothing kept for it.
    hub.on_announced(&worker(), None);
    hub.on_address(key(3), None, Some(address(3)));
    assert_eq!(hub.take_messages(start + 9 * VERSION_INTERVAL), []);
    hub.on_announced(&worker(), Some(announced("gw1.example")));
    copy.apply(hub.take_messages(start + 9 * VERSION_INTERVAL));
    assert!(copy.is_behind);
}

proptest! {
    /// Whatever messages are lost: a worker that is not behind has all addresses of the tenants.
    #[test]
    fn a_worker_that_is_not_behind_has_all_addresses(
        steps in prop::collection::vec((0_u8..5, 0_u8..3, prop::option::of(0_u8..250), 0_u8..10), 0..80),
    ) {
        let mut now = Instant::now();
        let (mut hub, mut copy, mut truth) = (hub(), Copy::default(), BTreeMap::new());
        for (number, (tenant, n, new, fate)) in (10..).zip(steps) {
            let new = new.map(|n| IpAddr::from([10, 64, tenant, n]));
            let before = match new {
                Some(new) => truth.insert((n, tenant), new),
                None => truth.remove(&(n, tenant)),
            };
            if before != new {
                hub.on_address(key(n), before, new);
            }
            let messages = hub.take_messages(now);
            match fate {
                0 => now += VERSION_INTERVAL,
                1 => hub.lead(number),
                2..4 => hub.on_request(&worker(), copy.version),
                // Lost.
                4 => continue,
                _ => {}
            }
            copy.apply(messages);
        }
        copy.apply(hub.take_messages(now + VERSION_INTERVAL));
        copy.apply(hub.take_messages(now + 2 * VERSION_INTERVAL));
        if copy.is_behind {
            hub.on_request(&worker(), copy.version);
            copy.apply(hub.take_messages(now + 2 * VERSION_INTERVAL));
        }
        let known: Vec<_> = copy.leases.iter().flat_map(|(key, known)| known.iter().map(|address| (*key, address))).collect();
        let wanted: BTreeSet<_> = truth.iter().map(|((n, _), address)| (key(*n), *address)).collect();
        prop_assert_eq!(known.len(), wanted.len());
        prop_assert_eq!(known.into_iter().collect::<BTreeSet<_>>(), wanted);
    }
}
