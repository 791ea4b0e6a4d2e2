//! The hub of tenants, which each broker announces to its members, and to which the coordinator publishes.

use wgkex_common::wire::lease::LeaseContent;

use super::*;

impl Rig {
    /// Each broker receives the announcement of the worker that is the hub.
    fn announce(&mut self, announced: Option<&AnnouncedHub>) {
        for broker in self.brokers.iter_mut().filter(|broker| broker.is_reached) {
            broker.tenants.on_hub(&HUB_WORKER.parse().unwrap(), announced.cloned(), self.now);
        }
    }

    /// The worker requests the addresses that it lacks from all brokers.
    fn ask(&mut self) {
        for broker in &mut self.brokers {
            let request = LeaseRequest { to: broker.name.clone(), server: HUB.into(), known: None };
            broker.tenants.on_lease_request(&HUB_WORKER.parse().unwrap(), &request);
        }
    }

    /// The messages of brokers to the worker: the broker, and how many keys have an address in a snapshot or changed.
    fn published(&mut self) -> Vec<(usize, i64, String)> {
        let mut published = Vec::new();
        for (number, broker) in self.brokers.iter_mut().enumerate() {
            for message in broker.tenants.take_hub_messages(self.now).into_iter().flat_map(|(_, messages)| messages) {
                let content = match message.content {
                    LeaseContent::Change(change) => format!("+{} -{}", change.added.len(), change.removed.len()),
                    LeaseContent::Chunk(chunk) => format!("all {}", chunk.leases.len()),
                    LeaseContent::Current => "current".into(),
                    LeaseContent::Deleted => "deleted".into(),
                };
                published.push((number, message.version.revision, content));
            }
        }
        published
    }
}

fn announced() -> AnnouncedHub {
    AnnouncedHub {
        public_key: PublicKey::from_bytes([200; 32]).unwrap(),
        endpoint_address: "gw1.example".into(),
        endpoint_port: 51830,
        networks: TenantNetworks { pool: vec!["10.64.0.0/10".parse().unwrap()], tenant_length: 20 },
    }
}

#[test]
fn the_coordinator_publishes_all_addresses_and_the_next_one_goes_on() {
    let mut rig = Rig::of(3);
    let before = rig.enter(1, 2);
    assert_eq!(rig.published(), [], "there is no hub");
    rig.announce(Some(&announced()));
    let Some((0, _, current)) = rig.published().pop() else { panic!("the coordinator says which version there is") };
    assert_eq!(current, "current");
    rig.ask();
    let [(0, version, all)] = &rig.published()[..] else { panic!("one of the brokers answers") };
    assert_eq!(all, "all 1");
    let version = *version;
    let _second = rig.enter(2, 3);
    assert_eq!(rig.published(), [(0, version + 1, "+1 -0".into())]);
    rig.leave(&before);
    assert_eq!(rig.published(), [], "its address is held");
    rig.wait(GRACE + Duration::from_secs(1));
    let published: Vec<_> = rig.published().into_iter().filter(|(_, _, content)| content != "current").collect();
    assert_eq!(published, [(0, version + 2, "+0 -1".into())]);
    // The next coordinator has other numbers, and publishes them when it knows all sessions.
    rig.kill(0);
    rig.wait(Duration::from_secs(20));
    assert_eq!(
        rig.published().last().map(|(broker, _, content)| (*broker, content.clone())),
        Some((1, "current".into()))
    );
    rig.ask();
    let published = rig.published();
    assert_eq!(
        published.iter().map(|(broker, _, content)| (*broker, content.as_str())).collect::<Vec<_>>(),
        [(1, "all 1")]
    );
}

#[test]
fn members_that_ask_for_the_hub_learn_of_it_and_of_changes() {
    let mut rig = Rig::of(2);
    let form = Form { hub: true, ..Form::default() };
    let [mut early, mut other] =
        [0, 1].map(|broker| rig.join_at(broker, "t", 2 + u8::try_from(broker).unwrap(), form, 100));
    let mut plain = rig.join_at(0, "t", 4, Form::default(), 100);
    rig.deliver();
    let texts = |guest: &mut Guest| -> Vec<String> {
        let mut texts = Vec::new();
        while let Ok(outgoing) = guest.queue.try_recv() {
            texts.push(match outgoing {
                Outgoing::Answer(welcome) => format!("{:?}", welcome.hub.map(|hub| hub.endpoint)),
                Outgoing::Text(text) if text.contains("hub") => text.to_string(),
                Outgoing::Text(_) => continue,
            });
        }
        texts
    };
    assert_eq!([&mut early, &mut other, &mut plain].map(texts), [["None"], ["None"], ["None"]]);
    rig.announce(Some(&announced()));
    for guest in [&mut early, &mut other] {
        let [text] = &texts(guest)[..] else { panic!("one message") };
        assert!(text.contains(r#""endpoint":"gw1.example:51830","allowed_ips":"10.64.0.0/20""#), "{text}");
    }
    assert!(texts(&mut plain).is_empty());
    rig.announce(Some(&announced()));
    assert!(texts(&mut early).is_empty(), "nothing changed");
    let mut late = rig.join_at(1, "u", 5, form, 100);
    rig.deliver();
    assert_eq!(texts(&mut late), [r#"Some("gw1.example:51830")"#]);
    rig.announce(None);
    assert_eq!(
        [&mut early, &mut other, &mut late].map(texts),
        [[r#"{"hub":null}"#], [r#"{"hub":null}"#], [r#"{"hub":null}"#]]
    );
    // One that does not read its messages is dropped.
    let mut slow = rig.join_at(0, "u", 6, form, 1);
    rig.deliver();
    rig.announce(Some(&announced()));
    rig.deliver();
    assert_eq!(slow.end(), Some(CloseCause::Slow));
    assert_eq!(rig.members(), 4);
}
