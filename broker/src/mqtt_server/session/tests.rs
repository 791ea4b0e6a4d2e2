//! A client's packets, and their effects.

use proptest::prelude::*;
use rumqttc::SubscribeFilter;
use wgkex_common::config::Role;

use super::*;

fn session() -> ClientSession {
    ClientSession::new(TopicAccess::everything(), false)
}

fn publish(topic: &str, qos: QoS, pkid: u16) -> Packet {
    Packet::Publish(Publish { pkid, ..Publish::new(topic, qos, "x") })
}

fn subscribe(filters: &[(&str, QoS)]) -> Packet {
    let filters = filters.iter().map(|(path, qos)| SubscribeFilter::new((*path).into(), *qos));
    Packet::Subscribe(Subscribe { pkid: 9, ..Subscribe::new_many(filters) })
}

fn message(topic: &str, qos: QoS) -> PublishedMessage {
    PublishedMessage { topic: topic.into(), payload: "x".into(), qos, retain: false }
}

/// The actions and the answers of the session.
fn take(session: &mut ClientSession, packet: Packet) -> (Vec<SessionAction>, Vec<Packet>) {
    let mut output = BytesMut::new();
    let actions = session.take(packet, LogPosition::default(), &mut output).unwrap();
    (actions, packets(output))
}

fn packets(mut output: BytesMut) -> Vec<Packet> {
    std::iter::from_fn(|| Packet::read(&mut output, usize::MAX).ok()).collect()
}

fn delivered(session: &mut ClientSession, message: PublishedMessage) -> Vec<Publish> {
    let mut output = BytesMut::new();
    session.deliver(message, &mut output);
    let publish = |packet| if let Packet::Publish(publish) = packet { publish } else { panic!("{packet:?}") };
    packets(output).into_iter().map(publish).collect()
}

#[test]
fn each_quality_of_service_has_its_answer_and_is_published_once() {
    let (mut session, said) = (session(), |qos| vec![SessionAction::Publish(message("a", qos))]);
    let (zero, one, two) = (QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce);
    assert_eq!(take(&mut session, publish("a", zero, 0)), (said(zero), vec![]));
    assert_eq!(take(&mut session, publish("a", one, 7)), (said(one), vec![Packet::PubAck(PubAck { pkid: 7 })]));
    let received = vec![Packet::PubRec(PubRec { pkid: 7 })];
    assert_eq!(take(&mut session, publish("a", two, 7)), (said(one), received.clone()));
    assert_eq!(take(&mut session, publish("a", two, 7)), (vec![], received.clone()), "it came again");
    let released = Packet::PubRel(PubRel { pkid: 7 });
    assert_eq!(take(&mut session, released), (vec![], vec![Packet::PubComp(PubComp { pkid: 7 })]));
    assert_eq!(take(&mut session, publish("a", two, 7)), (said(one), received));
}

#[test]
fn a_subscription_that_is_bad_or_forbidden_fails_alone() {
    use SubscribeReasonCode::{Failure, Success};
    let mut session = ClientSession::new(TopicAccess::of(Role::Worker, "gw1"), false);
    let filters = [
        ("wireguard/a/+", QoS::ExactlyOnce),
        ("a#/b", QoS::AtMostOnce),
        ("#", QoS::AtMostOnce),
        ("wgkex/worker/gw1/pages", QoS::AtMostOnce),
    ];
    let (actions, answers) = take(&mut session, subscribe(&filters));
    let forbidden = SessionAction::Deny { operation: TopicOperation::Subscribe, topic: "#".into(), is_first: true };
    assert_eq!(actions, [SessionAction::Subscribe, forbidden]);
    let codes = vec![Success(QoS::AtLeastOnce), Failure, Failure, Success(QoS::AtMostOnce)];
    assert_eq!(answers, [Packet::SubAck(SubAck::new(9, codes))]);
    let now = LogPosition::default();
    assert!(
        session.had_subscribed("wireguard/a/all", now) && !session.had_subscribed("wireguard-worker/gw1/status", now)
    );
}

#[test]
fn a_subscription_has_what_is_published_after_it_and_misses_nothing_when_it_is_renewed() {
    let (mut session, at) = (session(), LogPosition::new);
    for (filter, since) in [("a/+", 10), ("a/#", 20), ("a/+", 30)] {
        session.take(subscribe(&[(filter, QoS::AtMostOnce)]), at(since), &mut BytesMut::new()).unwrap();
    }
    for (topic, position, is_expected) in [("a/b", 9, false), ("a/b", 10, true), ("a", 19, false), ("a", 20, true)] {
        assert_eq!(session.had_subscribed(topic, at(position)), is_expected, "{topic} at {position}");
    }
    let unsubscribe = Packet::Unsubscribe(Unsubscribe { pkid: 1, topics: vec!["a/+".into()] });
    session.take(unsubscribe, at(40), &mut BytesMut::new()).unwrap();
    assert!(!session.had_subscribed("a/b", at(19)) && session.had_subscribed("a/b", at(20)));
}

#[test]
fn a_forbidden_publish_is_acknowledged_and_dropped() {
    let mut session = ClientSession::new(TopicAccess::of(Role::Worker, "gw1"), false);
    for is_first in [true, false] {
        let (actions, answers) = take(&mut session, publish("wireguard/ffx_a/all", QoS::AtLeastOnce, 3));
        assert_eq!(
            actions,
            [SessionAction::Deny { operation: TopicOperation::Publish, topic: "wireguard/ffx_a/all".into(), is_first }]
        );
        assert_eq!(answers, [Packet::PubAck(PubAck { pkid: 3 })]);
    }
}

#[test]
fn a_violation_of_the_protocol_ends_the_connection() {
    let connect = Packet::Connect(rumqttc::Connect::new("x"));
    for packet in [publish("a/+", QoS::AtMostOnce, 0), publish("", QoS::AtMostOnce, 0), connect, Packet::PingResp] {
        assert!(session().take(packet.clone(), LogPosition::default(), &mut BytesMut::new()).is_err(), "{packet:?}");
    }
}

#[test]
fn a_message_comes_with_the_lower_quality_until_its_subscription_ends() {
    let mut session = session();
    let _ = take(&mut session, subscribe(&[("a/+", QoS::AtLeastOnce), ("b", QoS::AtMostOnce), ("#", QoS::AtMostOnce)]));
    for (topic, said, heard) in [("a/x", 1, 1), ("a/x", 0, 0), ("b", 1, 0), ("c", 1, 0)] {
        let said = rumqttc::qos(said).unwrap();
        let [publish] = &delivered(&mut session, message(topic, said))[..] else { panic!("{topic}") };
        assert_eq!((publish.qos as u8, publish.pkid != 0), (heard, heard == 1), "{topic}");
    }
    let unsubscribe = |topics: &[&str]| {
        let topics = topics.iter().map(|&topic| topic.to_owned()).collect();
        Packet::Unsubscribe(Unsubscribe { pkid: 4, topics })
    };
    let answer = vec![Packet::UnsubAck(UnsubAck { pkid: 4 })];
    assert_eq!(take(&mut session, unsubscribe(&["#", "never/had"])), (vec![], answer));
    assert!(delivered(&mut session, message("c", QoS::AtMostOnce)).is_empty());
    assert_eq!(delivered(&mut session, message("a/x", QoS::AtMostOnce)).len(), 1);
}

#[test]
fn acknowledgements_make_room_in_any_order() {
    let mut session = session();
    let _ = take(&mut session, subscribe(&[("#", QoS::AtLeastOnce)]));
    let mut identifiers: Vec<u16> = Vec::new();
    while session.room() > 0 {
        identifiers.extend(delivered(&mut session, message("a", QoS::AtLeastOnce)).iter().map(|publish| publish.pkid));
    }
    assert_eq!(identifiers.iter().collect::<BTreeSet<_>>().len(), IN_FLIGHT_MAX);
    for pkid in identifiers.into_iter().rev().chain([9999]) {
        let _ = take(&mut session, Packet::PubAck(PubAck { pkid }));
    }
    assert_eq!(session.room(), IN_FLIGHT_MAX);
}

#[test]
fn an_identifier_under_way_is_not_given_again() {
    let mut session = session();
    let _ = take(&mut session, subscribe(&[("#", QoS::AtLeastOnce)]));
    let first = delivered(&mut session, message("a", QoS::AtLeastOnce))[0].pkid;
    for _ in 0..=u16::MAX {
        let pkid = delivered(&mut session, message("a", QoS::AtLeastOnce))[0].pkid;
        assert!(pkid != first && pkid != 0);
        let _ = take(&mut session, Packet::PubAck(PubAck { pkid }));
    }
}

#[test]
fn each_subscription_delivers_the_retained_messages_and_only_once_at_a_time() {
    let mut session = session();
    let _ = take(&mut session, subscribe(&[("a", QoS::AtLeastOnce), ("b", QoS::AtLeastOnce)]));
    session.advance_retained(Some("a".into()));
    for _ in 0..1000 {
        let _ = take(&mut session, subscribe(&[("a", QoS::AtLeastOnce)]));
    }
    let cursor = |filter: &str| RetainedCursor { filter: filter.into(), after: None };
    assert_eq!(session.retained, [cursor("b"), cursor("a")]);
    session.advance_retained(None);
    assert_eq!(session.next_retained(), Some(&cursor("a")));
}

#[test]
fn subscriptions_are_bounded() {
    let mut session = session();
    for n in 0..FILTERS_MAX + 10 {
        let _ = take(&mut session, subscribe(&[(n.to_string().as_str(), QoS::AtMostOnce)]));
    }
    let (_, answers) = take(&mut session, subscribe(&[("one more", QoS::AtMostOnce), ("1", QoS::AtMostOnce)]));
    let codes = vec![SubscribeReasonCode::Failure, SubscribeReasonCode::Success(QoS::AtMostOnce)];
    assert_eq!(answers, [Packet::SubAck(SubAck::new(9, codes))]);
    assert_eq!((session.subscriptions.len(), session.retained.len()), (FILTERS_MAX, FILTERS_MAX));
    let (_, answers) = take(&mut session, subscribe(&[(&"0/".repeat(LEVELS_MAX), QoS::AtMostOnce)]));
    assert_eq!(answers, [Packet::SubAck(SubAck::new(9, vec![SubscribeReasonCode::Failure]))]);
}

#[test]
fn a_packet_names_only_so_many_topics() {
    let topics: Vec<_> = (0..=FILTERS_MAX).map(|n| n.to_string()).collect();
    let filters = topics.iter().map(|topic| SubscribeFilter::new(topic.clone(), QoS::AtMostOnce));
    let many = Packet::Subscribe(Subscribe { pkid: 9, ..Subscribe::new_many(filters) });
    assert!(session().take(many, LogPosition::default(), &mut BytesMut::new()).is_err());
    let unsubscribe = |count| Packet::Unsubscribe(Unsubscribe { pkid: 4, topics: topics[..count].to_vec() });
    assert!(session().take(unsubscribe(FILTERS_MAX + 1), LogPosition::default(), &mut BytesMut::new()).is_err());
    assert!(session().take(unsubscribe(FILTERS_MAX), LogPosition::default(), &mut BytesMut::new()).is_ok());
}

#[test]
fn a_packet_costs_by_its_topics_and_an_expected_acknowledgement_nothing() {
    let mut session = session();
    let _ = take(&mut session, subscribe(&[("a", QoS::AtLeastOnce)]));
    let pkid = delivered(&mut session, message("a", QoS::AtLeastOnce))[0].pkid;
    let acknowledgement = |pkid| session.work(&Packet::PubAck(PubAck { pkid }));
    assert_eq!((acknowledgement(pkid), acknowledgement(4711)), (0, PACKET_COST));
    let unsubscribe = Packet::Unsubscribe(Unsubscribe { pkid: 4, topics: vec!["a".into(), "b".into()] });
    assert_eq!((session.work(&unsubscribe), session.work(&Packet::PingReq)), (3 * PACKET_COST, PACKET_COST));
}

proptest! {
    /// The codec is rumqttc's; here it reads packets of strangers.
    #[test]
    fn no_bytes_make_it_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        kind in 0..16u8,
        flags in 0..16u8,
    ) {
        let mut session = session();
        let mut framed = BytesMut::from(&[kind << 4 | flags, u8::try_from(bytes.len()).unwrap()][..]);
        framed.extend_from_slice(&bytes);
        for mut input in [framed, BytesMut::from(&bytes[..])] {
            while let Ok(packet) = Packet::read(&mut input, 1 << 20) {
                let _ = session.take(packet, LogPosition::default(), &mut BytesMut::new());
            }
        }
    }
}
