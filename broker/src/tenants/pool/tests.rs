use proptest::prelude::*;

use super::*;

const GRACE: Duration = Duration::from_secs(60);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn tenants(pool: &[&str], length: u8, grace: Duration) -> Tenants {
    let networks = TenantNetworks { pool: pool.iter().map(|part| net(part)).collect(), tenant_length: length };
    Tenants::new(&networks, grace)
}

fn id(number: usize) -> TenantId {
    TenantId::new(&number.to_string()).unwrap()
}

fn key(number: u8) -> PublicKey {
    PublicKey::from_bytes([number.wrapping_add(2); 32]).unwrap()
}

fn client(number: u8) -> MemberInfo {
    MemberInfo { display_name: "A".into(), public_key: key(number), endpoint: None }
}

/// A session for each key, in a pool whose clock is moved by hand.
struct Rig {
    tenants: Tenants,
    now: Instant,
}

impl Rig {
    fn new(pool: &[&str], length: u8, grace: Duration) -> Self {
        Self { tenants: tenants(pool, length, grace), now: Instant::now() }
    }

    /// The address that the key gets in the tenant.
    fn join(&mut self, tenant: usize, number: u8) -> Result<String, JoinError> {
        let session = MemberId(u64::from(number) + 1000 * u64::try_from(tenant).unwrap());
        let joined = self.tenants.join(&id(tenant), session, client(number), self.now);
        joined.map(|member| member.virtual_ip.to_string())
    }

    fn leave(&mut self, tenant: usize, number: u8) -> bool {
        let session = MemberId(u64::from(number) + 1000 * u64::try_from(tenant).unwrap());
        self.tenants.leave(&id(tenant), session, self.now).is_some()
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.tenants.expire(self.now);
    }
}

#[test]
fn addresses_are_the_lowest_free_ones_and_are_held_for_their_keys() {
    let mut rig = Rig::new(&["10.64.0.0/10"], 20, GRACE);
    for (number, address) in [(1, "10.64.0.1"), (2, "10.64.0.2"), (3, "10.64.0.3")] {
        assert_eq!(rig.join(0, number).as_deref(), Ok(address));
    }
    assert_eq!(rig.join(1, 1).as_deref(), Ok("10.64.16.1"), "another tenant, and the same key");
    assert_eq!(rig.join(0, 2), Err(JoinError::KeyInUse(MemberId(2))));
    let free = "10.64.0.9".parse().unwrap();
    assert!(!rig.tenants.restore(&id(0), key(2), free, rig.now), "a member has one address");
    assert!(rig.leave(0, 2) && !rig.leave(0, 2));
    assert_eq!(rig.join(0, 4).as_deref(), Ok("10.64.0.4"), "what is held is not free");
    assert_eq!(rig.join(0, 2).as_deref(), Ok("10.64.0.2"));
    assert!(rig.leave(0, 1));
    rig.wait(GRACE);
    assert_eq!(rig.join(0, 5).as_deref(), Ok("10.64.0.1"));
    assert_eq!(rig.tenants.counts(), TenantCounts { tenants: 2, members: 5, held: 0 });
}

#[test]
fn a_tenant_without_members_keeps_its_network_while_addresses_are_held_and_another_is_free() {
    let mut rig = Rig::new(&["10.0.0.0/27"], 28, GRACE);
    assert_eq!(rig.join(0, 1).as_deref(), Ok("10.0.0.1"));
    assert_eq!(rig.join(1, 1).as_deref(), Ok("10.0.0.17"));
    assert_eq!(rig.join(2, 1), Err(JoinError::NoNetwork));
    assert!(rig.leave(1, 1));
    rig.wait(GRACE / 2);
    assert!(rig.leave(0, 1));
    assert_eq!(rig.join(2, 1).as_deref(), Ok("10.0.0.17"), "the other has been empty for a shorter time");
    assert_eq!(rig.join(1, 1).as_deref(), Ok("10.0.0.1"));
    assert_eq!(rig.join(0, 1), Err(JoinError::NoNetwork));
    assert!(rig.leave(2, 1));
    rig.wait(GRACE);
    assert_eq!(rig.tenants.counts(), TenantCounts { tenants: 1, members: 1, held: 0 });
}

#[test]
fn a_full_network_gives_away_the_address_that_is_held_for_the_longest_time() {
    let mut rig = Rig::new(&["192.0.2.0/29"], 29, GRACE);
    for number in 1..=6 {
        assert_eq!(rig.join(0, number), Ok(format!("192.0.2.{number}")));
    }
    assert_eq!(rig.join(0, 7), Err(JoinError::NoAddress));
    assert!(rig.leave(0, 5));
    rig.wait(Duration::from_secs(1));
    assert!(rig.leave(0, 2));
    assert_eq!(rig.join(0, 7).as_deref(), Ok("192.0.2.5"));
    assert_eq!(rig.join(0, 2).as_deref(), Ok("192.0.2.2"));
    assert_eq!(rig.join(0, 5), Err(JoinError::NoAddress));
}

#[test]
fn where_too_many_addresses_are_held_the_tenant_with_most_gives_up_its_oldest() {
    let mut rig = Rig::new(&["10.64.0.0/10"], 20, GRACE);
    rig.tenants.held_max = 4;
    let come_and_go = |rig: &mut Rig, tenant, number| {
        rig.join(tenant, number).unwrap();
        assert!(rig.leave(tenant, number));
        rig.wait(Duration::from_secs(1));
    };
    // Members of tenant 0 join and leave without end, tenant 1 has one address.
    (1..4).for_each(|number| come_and_go(&mut rig, 0, number));
    come_and_go(&mut rig, 1, 1);
    (4..9).for_each(|number| come_and_go(&mut rig, 0, number));
    come_and_go(&mut rig, 1, 2);
    assert_eq!(rig.tenants.counts(), TenantCounts { tenants: 2, members: 0, held: 4 });
    let mut kept = BTreeSet::new();
    for AddressChange { tenant, key, address } in rig.tenants.take_changes() {
        match address {
            Some(_) => drop(kept.insert((tenant, key))),
            None => drop(kept.remove(&(tenant, key))),
        }
    }
    assert_eq!(kept, [(0, 7), (0, 8), (1, 1), (1, 2)].map(|(tenant, number)| (id(tenant), key(number))).into());
    let free = "10.64.32.9".parse().unwrap();
    assert!(rig.tenants.restore(&id(2), key(1), free, rig.now), "it has fewer than others");
    assert_eq!(rig.tenants.counts().held, 4);
    rig.wait(GRACE);
    assert_eq!((rig.tenants.counts(), rig.tenants.holding.len()), (TenantCounts::default(), 0));
}

#[test]
fn without_grace_an_address_is_free_at_once() {
    let mut rig = Rig::new(&["192.0.2.0/28"], 28, Duration::ZERO);
    assert_eq!(rig.join(0, 1).as_deref(), Ok("192.0.2.1"));
    assert!(rig.leave(0, 1));
    assert_eq!(rig.tenants.counts(), TenantCounts::default());
    assert_eq!(rig.join(1, 2).as_deref(), Ok("192.0.2.1"));
}

#[test]
fn the_networks_of_the_original_are_a_pool_of_two() {
    let mut rig = Rig::new(&["192.168.1.0/24", "172.16.0.0/16"], 16, GRACE);
    let addresses = [0, 1, 2].map(|tenant| rig.join(tenant, 1));
    assert_eq!(addresses, [Ok("192.168.1.1".into()), Ok("172.16.0.1".into()), Err(JoinError::NoNetwork)]);
    let mut six = Rig::new(&["fd00::/48"], 64, GRACE);
    assert_eq!((six.join(0, 1), six.join(1, 1)), (Ok("fd00::1".into()), Ok("fd00:0:0:1::1".into())));
}

#[test]
fn what_changed_restores_the_addresses() {
    let mut rig = Rig::new(&["10.64.0.0/10"], 20, GRACE);
    for (tenant, number) in [(0, 1), (0, 2), (1, 1), (0, 3), (2, 1)] {
        rig.join(tenant, number).unwrap();
    }
    assert!(rig.leave(0, 1) && rig.leave(1, 1));
    rig.wait(GRACE);
    assert!(rig.leave(0, 2));
    let mut kept = BTreeMap::new();
    for AddressChange { tenant, key, address } in rig.tenants.take_changes() {
        match address {
            Some(address) => drop(kept.insert((tenant, key), address)),
            None => drop(kept.remove(&(tenant, key))),
        }
    }
    let all = rig.tenants.addresses().into_iter();
    assert_eq!(
        all.map(|change| ((change.tenant, change.key), change.address.unwrap())).collect::<BTreeMap<_, _>>(),
        kept
    );

    let mut again = Rig::new(&["10.64.0.0/10"], 20, GRACE);
    for ((tenant, key), address) in kept {
        assert!(again.tenants.restore(&tenant, key, address, again.now));
    }
    assert_eq!(again.tenants.counts(), TenantCounts { tenants: 2, members: 0, held: 3 });
    assert_eq!(again.join(0, 9).as_deref(), Ok("10.64.0.1"), "nobody had it");
    assert_eq!(again.join(0, 2).as_deref(), Ok("10.64.0.2"));
    assert_eq!(again.join(2, 1).as_deref(), Ok("10.64.32.1"));
    again.wait(GRACE);
    assert_eq!(again.tenants.counts(), TenantCounts { tenants: 2, members: 3, held: 0 });
}

#[test]
fn what_does_not_fit_is_not_restored() {
    let mut rig = Rig::new(&["10.0.0.0/27"], 28, GRACE);
    let mut restore = |tenant, number, address: &str| {
        rig.tenants.restore(&id(tenant), key(number), address.parse().unwrap(), rig.now)
    };
    assert!(restore(0, 1, "10.0.0.5"));
    assert!(!restore(0, 2, "10.0.0.5"), "an address twice");
    assert!(!restore(0, 1, "10.0.0.6"), "a key twice");
    assert!(!restore(1, 1, "10.0.0.6"), "a network twice");
    assert!(!restore(0, 3, "10.0.0.20"), "two networks");
    for address in ["10.0.0.16", "10.0.0.31", "10.0.0.32", "fd00::1"] {
        assert!(!restore(2, 1, address), "{address}");
    }
    assert_eq!(rig.tenants.counts(), TenantCounts { tenants: 1, members: 0, held: 1 });
}

/// A step of three tenants in a pool of two networks of six addresses each.
#[derive(Debug, Clone)]
enum Step {
    Join(usize, u8),
    Leave(usize, u8),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0_usize..3, 0_u8..9).prop_map(|(tenant, number)| Step::Join(tenant, number)),
        4 => (0_usize..3, 0_u8..9).prop_map(|(tenant, number)| Step::Leave(tenant, number)),
        1 => (0_u64..50).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 0..300)
}

/// A tenant as plain lists.
#[derive(Debug, Default)]
struct Model {
    network: Option<usize>,
    members: BTreeMap<u8, u8>,
    /// Address and time, by key.
    held: BTreeMap<u8, (u8, Instant)>,
    emptied: Option<Instant>,
    /// The addresses and keys of the others that each member knows from its answer and from later messages.
    known: BTreeMap<u8, BTreeMap<u8, u8>>,
}

impl Model {
    /// The address that a key gets, and whether another key loses it.
    fn address(&self, number: u8) -> Option<(u8, Option<u8>)> {
        if let Some((address, _)) = self.held.get(&number) {
            return Some((*address, None));
        }
        let is_free = |address: &u8| {
            self.members.values().all(|taken| taken != address) && self.held.values().all(|(held, _)| held != address)
        };
        let oldest = self.held.iter().min_by_key(|(_, (address, since))| (*since, *address));
        let oldest = oldest.map(|(number, (address, _))| (*address, Some(*number)));
        (1..=6).find(is_free).map(|address| (address, None)).or(oldest)
    }

    fn join(&mut self, number: u8, address: u8, other: Option<u8>) {
        self.held.remove(&number);
        if let Some(other) = other {
            self.held.remove(&other);
        }
        for known in self.known.values_mut() {
            known.insert(address, number);
        }
        self.known.insert(number, self.members.iter().map(|(number, address)| (*address, *number)).collect());
        self.members.insert(number, address);
        self.emptied = None;
    }

    fn leave(&mut self, number: u8, now: Instant) -> bool {
        let Some(address) = self.members.remove(&number) else { return false };
        self.known.remove(&number);
        for known in self.known.values_mut() {
            known.remove(&address);
        }
        self.held.insert(number, (address, now));
        self.emptied = self.members.is_empty().then_some(now);
        true
    }

    fn expire(&mut self, now: Instant) {
        self.held.retain(|_, (_, since)| now.duration_since(*since) < GRACE);
        if self.members.is_empty() && self.held.is_empty() {
            *self = Self::default();
        }
    }
}

/// The network that a tenant gets: its own, else the lowest free one, else that of the tenant that was emptied first.
fn model_network(models: &mut [Model], tenant: usize) -> Option<usize> {
    if let Some(network) = models[tenant].network {
        return Some(network);
    }
    if let Some(free) = (0..2).find(|network| models.iter().all(|model| model.network != Some(*network))) {
        return Some(free);
    }
    let emptied = models.iter().enumerate().filter_map(|(other, model)| Some((model.emptied?, other)));
    let (_, other) = emptied.min()?;
    std::mem::take(&mut models[other]).network
}

proptest! {
    /// Members know the true state, no address is given twice, and each is the one that the rules name.
    #[test]
    fn tenants_are_as_the_rules_have_it(steps in steps()) {
        let mut rig = Rig::new(&["10.0.0.0/28"], 29, GRACE);
        let mut models: [Model; 3] = Default::default();
        for step in steps {
            match step {
                Step::Join(tenant, number) if models[tenant].members.contains_key(&number) => {
                    let is_refused = matches!(rig.join(tenant, number), Err(JoinError::KeyInUse(_)));
                    prop_assert!(is_refused);
                }
                Step::Join(tenant, number) => {
                    let joined = rig.join(tenant, number);
                    let Some(network) = model_network(&mut models, tenant) else {
                        prop_assert_eq!(joined, Err(JoinError::NoNetwork));
                        continue;
                    };
                    let model = &mut models[tenant];
                    model.network = Some(network);
                    let Some((address, other)) = model.address(number) else {
                        prop_assert_eq!(joined, Err(JoinError::NoAddress));
                        continue;
                    };
                    prop_assert_eq!(joined, Ok(format!("10.0.0.{}", network * 8 + usize::from(address))));
                    model.join(number, address, other);
                }
                Step::Leave(tenant, number) => {
                    prop_assert_eq!(rig.leave(tenant, number), models[tenant].leave(number, rig.now));
                }
                Step::Wait(seconds) => {
                    rig.wait(Duration::from_secs(seconds));
                    for model in &mut models {
                        model.expire(rig.now);
                    }
                }
            }
            // Time passes between any two steps, so that no two things are equally old.
            rig.now += Duration::from_micros(1);
            for (tenant, model) in models.iter().enumerate() {
                let network = model.network.unwrap_or_default();
                let entry = |address: u8, number: u8| (format!("10.0.0.{}", network * 8 + usize::from(address)), key(number));
                let tenant = id(tenant);
                let members = rig.tenants.members().filter(|(id, ..)| **id == tenant);
                let members = members.map(|(_, _, member)| (member.virtual_ip.to_string(), member.client.public_key));
                let truth: BTreeMap<_, _> = members.collect();
                prop_assert_eq!(truth.len(), model.members.len());
                for (number, known) in &model.known {
                    let mut known: BTreeMap<_, _> = known.iter().map(|(address, key)| entry(*address, *key)).collect();
                    known.extend([entry(model.members[number], *number)]);
                    prop_assert_eq!(&known, &truth);
                }
            }
            let held = models.iter().map(|model| model.held.len()).sum();
            let members = models.iter().map(|model| model.members.len()).sum();
            let used = models.iter().filter(|model| model.network.is_some()).count();
            prop_assert_eq!(rig.tenants.counts(), TenantCounts { tenants: used, members, held });
        }
    }
}
