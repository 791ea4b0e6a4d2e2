//! A drain past its deadline.

use wgkex_common::drain::DrainRequest;
use wgkex_common::wire::drain::Drain;

use super::*;

/// A drain whose deadline is over.
fn over(percent: u8) -> Drain {
    let request = DrainRequest { deadline: Some("1s"), percent: Some(percent), ..DrainRequest::default() };
    Drain::begin(request, 0).unwrap().at(1)
}

/// A gateway, and the sender of its drain. The `connected` peers repeat their handshakes while they exist.
struct Draining {
    gateway: Gateway,
    drain: watch::Sender<Option<Drain>>,
    connected: BTreeSet<PublicKey>,
}

impl Draining {
    /// A worker that starts with this state, on a kernel that may have peers.
    fn on(memory: &MemoryKernel, drain: Option<Drain>, remembered: Keys) -> Self {
        let (drain, receiver) = watch::channel(drain);
        let parts = ReconcilerParts { drain: receiver, remembered, ..start_with(memory.clone()) };
        Self { gateway: Gateway::of(memory.clone(), Reconciler::new(parts)), drain, connected: BTreeSet::new() }
    }

    /// The first `connected` of `all` peers are.
    async fn with(all: u32, connected: u32) -> Self {
        let mut draining = Self::on(&MemoryKernel::with(&[domain()]), None, Keys::default());
        draining.gateway.enqueue(0..all);
        draining.gateway.settle().await;
        draining.connected = (0..connected).map(key).collect();
        draining.shake_hands();
        draining
    }

    fn shake_hands(&self) {
        for key in &self.connected {
            self.gateway.memory.handshake(&domain(), *key, SystemTime::now());
        }
        self.gateway.memory.trigger();
    }

    /// How many peers exist that are connected, and how many others.
    fn peers(&self) -> (usize, usize) {
        let peers = self.gateway.device().peers;
        let connected = peers.keys().filter(|key| self.connected.contains(key)).count();
        (connected, peers.len() - connected)
    }

    fn has(&self, n: u32) -> bool {
        self.gateway.device().peers.contains_key(&key(n))
    }

    fn removed(&self) -> u64 {
        self.gateway.metrics.peers.drained.with_label_values(&["ffmuc_welt"]).get()
    }
}

#[tokio::test(start_paused = true)]
async fn past_the_deadline_connected_and_other_peers_go_in_portions_of_their_own() {
    let mut draining = Draining::with(100, 40).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(draining.peers(), (40, 60), "a drain removes none");
    draining.drain.send_replace(Some(Drain { deadline: None, ..over(10) }));
    sleep(10 * MINUTE).await;
    draining.shake_hands();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(draining.peers(), (40, 60), "nor does one without a deadline");

    draining.drain.send_replace(Some(over(10)));
    for minute in 1..=10 {
        sleep(Duration::from_secs(1)).await;
        assert_eq!(draining.peers(), (40 - 4 * minute, 60 - 6 * minute), "after {minute} portions");
        draining.shake_hands();
        sleep(Duration::from_secs(58)).await;
        assert_eq!(draining.peers(), (40 - 4 * minute, 60 - 6 * minute), "before the next portion");
        draining.shake_hands();
        sleep(Duration::from_secs(1)).await;
    }
    let device = draining.gateway.device();
    assert_eq!((device.routes.len(), device.fdb.len(), draining.removed()), (0, 0, 100));
    while let Ok(applied) = draining.gateway.said.applied.try_recv() {
        assert!(applied.failed.values().all(|reason| *reason == RejectReason::Removed));
    }
}

#[tokio::test(start_paused = true)]
async fn those_that_are_silent_for_longest_go_first() {
    let draining = Draining::with(20, 0).await;
    for n in [3, 7] {
        draining.gateway.memory.handshake(&domain(), key(n), SystemTime::now());
        draining.gateway.memory.trigger();
        sleep(MINUTE).await;
    }
    sleep(5 * MINUTE).await;
    draining.drain.send_replace(Some(over(90)));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(draining.gateway.device().peers.into_keys().collect::<Vec<_>>(), [key(3), key(7)]);
    draining.drain.send_replace(Some(over(5)));
    sleep(9 * MINUTE).await;
    assert!(draining.has(3) && draining.has(7), "what went before counts");
    sleep(2 * MINUTE).await;
    assert!(!draining.has(3) && draining.has(7), "one in ten minutes is five percent of two a minute");
}

#[tokio::test(start_paused = true)]
async fn peers_that_others_made_and_trusted_keys_stay() {
    let draining = Draining::with(10, 5).await;
    let trusted = [Entry::new(List::Trusted, key(1)), Entry::new(List::Trusted, key(8))];
    draining.gateway.handle.set_admission(Arc::new(Admission::of(&trusted, AllowList::Off, 0)), []);
    draining.gateway.memory.alter(&domain(), |device| {
        for n in [2, 9] {
            device.peers.get_mut(&key(n)).unwrap().allowed_ips.push("fd00::/64".parse().unwrap());
        }
    });
    draining.drain.send_replace(Some(over(100)));
    sleep(5 * MINUTE).await;
    assert_eq!(draining.gateway.device().peers.into_keys().collect::<Vec<_>>(), [1, 2, 8, 9].map(key));
}

#[tokio::test(start_paused = true)]
async fn what_is_removed_comes_back_by_a_routers_request_only_and_stays_if_the_router_connects() {
    let mut draining = Draining::with(6, 6).await;
    draining.drain.send_replace(Some(over(100)));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(draining.peers(), (0, 0));
    draining.gateway.settle().await;
    let established = |n| (key(n), Age { age_secs: 60, has_handshake: true });
    draining.gateway.handle.learn(domain(), (0..9).map(established).collect()).await;
    sleep(MINUTE).await;
    assert_eq!(draining.peers(), (0, 0), "no snapshot brings them");

    draining.gateway.enqueue([1, 2]);
    assert_eq!(draining.gateway.confirmed().await.installed, [key(1), key(2)], "there may be no other gateway");
    draining.gateway.memory.handshake(&domain(), key(2), SystemTime::now());
    draining.gateway.memory.trigger();
    sleep(9 * MINUTE).await;
    assert!(draining.has(1) && draining.has(2), "they have their grace");
    for _ in 0..3 {
        draining.gateway.memory.handshake(&domain(), key(2), SystemTime::now());
        draining.gateway.memory.trigger();
        sleep(MINUTE).await;
    }
    assert!(!draining.has(1) && draining.has(2), "the router of the first is elsewhere");
    sleep(10 * MINUTE).await;
    assert!(!draining.has(2), "the other one has left");

    draining.drain.send_replace(None);
    sleep(MINUTE).await;
    draining.gateway.handle.learn(domain(), (0..9).map(established).collect()).await;
    sleep(MINUTE).await;
    assert!((0..9).all(|n| draining.has(n)), "it drains no longer");
}

#[tokio::test(start_paused = true)]
async fn peers_that_another_program_removed_are_put_back_also_past_the_deadline() {
    let draining = Draining::with(100, 0).await;
    draining.drain.send_replace(Some(over(1)));
    sleep(Duration::from_secs(1)).await;
    draining.gateway.memory.alter(&domain(), |device| device.peers.clear());
    draining.gateway.memory.trigger();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(draining.peers(), (0, 99));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_restarted_goes_on_after_a_minute_and_restores_no_key() {
    let draining = Draining::with(100, 0).await;
    draining.drain.send_replace(Some(over(20)));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(draining.peers(), (0, 80));
    let Draining { gateway: Gateway { memory, stop, task, .. }, .. } = draining;
    stop.send(()).unwrap();
    task.await.unwrap();

    let draining = Draining::on(&memory, Some(over(20)), remembered(0..200));
    sleep(Duration::from_secs(59)).await;
    assert_eq!(draining.peers(), (0, 80), "the last portion may have been removed just before");
    sleep(Duration::from_secs(2)).await;
    assert_eq!(draining.peers(), (0, 64), "a part of those that are left");
    sleep(5 * MINUTE).await;
    assert_eq!(draining.peers(), (0, 0));
    draining.gateway.enqueue([3]);
    sleep(Duration::from_secs(1)).await;
    assert!(draining.has(3));
}

#[tokio::test(start_paused = true)]
async fn a_large_portion_goes_in_parts_between_which_keys_have_their_turn() {
    let mut draining = Draining::with(6_000, 0).await;
    draining.gateway.applies();
    draining.drain.send_replace(Some(over(50)));
    draining.gateway.memory.delay(Delays { apply: Duration::from_millis(10), ..Delays::default() });
    sleep(Duration::from_millis(200)).await;
    draining.gateway.enqueue([10_000]);
    assert_eq!(timeout(Duration::from_millis(300), installed(&mut draining.gateway)).await.unwrap(), [key(10_000)]);
    sleep(Duration::from_secs(30)).await;
    assert_eq!(draining.peers(), (0, 3_001));
    assert!(draining.gateway.applies().iter().all(|changes| changes.len() <= 3 * 512));
}

/// The next keys that are installed.
async fn installed(gateway: &mut Gateway) -> Vec<PublicKey> {
    loop {
        let installed = gateway.confirmed().await.installed;
        if !installed.is_empty() {
            return installed;
        }
    }
}
