//! When a program publishes its states again: retained messages under its name may be wrong, by a last will that is
//! published late, by a server that loses or never delivers retained messages, or by another client. No IO, no clock.
//!
//! Brokers and workers each have one. On every connection they publish their states without it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::Topic;
use crate::mqtt::{Message, Publish};
use crate::wire::name::Participant;

/// The regular interval of publishing the states again.
const REPUBLISH_INTERVAL: Duration = Duration::from_secs(60);
/// How long after another broker or worker connected the states are published for it at the earliest, and the time over
/// which all programs spread.
const NEWCOMER_DELAY: Duration = Duration::from_secs(2);
const NEWCOMER_SPREAD: Duration = Duration::from_secs(3);
/// How long after a wrong message under the own name the states are published: several such messages cause one
/// correction.
const CORRECTION_DELAY: Duration = Duration::from_millis(100);
/// The shortest pause between two publications for the same reason.
const CORRECTION_PAUSE: Duration = Duration::from_secs(10);
/// Brokers and workers that are remembered at most.
const ONLINE_NAMES_MAX: usize = 8192;
/// Queued messages for a program's publisher at most; dropped ones are made up for within a minute.
const PRESENCE_EVENTS_MAX: usize = 1024;
/// Bytes of a message under the own name that are compared: more than any state has.
const OWN_MAX: usize = 1 << 16;

/// How the states are to be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announcement {
    /// Retained: they replace the retained messages.
    Retained,
    /// Not retained: for subscribers that may not have received the retained messages.
    Transient,
}

impl Announcement {
    /// The message of a state, for this kind of announcement.
    #[must_use]
    pub fn apply_to(self, state: Message) -> Message {
        match self {
            Self::Retained => state,
            Self::Transient => state.not_retained(),
        }
    }
}

/// A message about the state of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PresenceEvent {
    /// The status of another broker or worker.
    Status {
        /// The owner of the status.
        party: Participant,
        /// Whether it is online.
        online: bool,
        /// Whether the message was retained, so that its owner was online before.
        retained: bool,
    },
    /// A message on a topic of the program itself.
    Own(Topic, Vec<u8>),
}

impl PresenceEvent {
    /// The event of a message for the program `own`. A retained message under the own name is older than the states
    /// published on this connection, and no event.
    #[must_use]
    pub fn read(topic: &Topic, payload: &[u8], retained: bool, own: &Participant) -> Option<Self> {
        let owner = topic.state_of()?;
        let is_status = matches!(topic, Topic::BrokerStatus { .. } | Topic::WorkerStatus { .. });
        if owner == *own {
            let start = &payload[..payload.len().min(OWN_MAX)];
            (!retained).then(|| Self::Own(topic.clone(), start.to_vec()))
        } else {
            is_status.then(|| Self::Status { party: owner, online: payload == b"1", retained })
        }
    }
}

/// The sender of a program's sessions to its publisher.
#[derive(Debug, Clone)]
pub struct Reporter {
    own: Participant,
    events: mpsc::Sender<PresenceEvent>,
}

impl Reporter {
    /// The reporter of the program `own`, and the receiver for its publisher.
    #[must_use]
    pub fn new(own: Participant) -> (Self, mpsc::Receiver<PresenceEvent>) {
        let (events, received) = mpsc::channel(PRESENCE_EVENTS_MAX);
        (Self { own, events }, received)
    }

    /// Passes on a message about the state of a program; false if it is about something else.
    pub fn report(&self, topic: &Topic, publish: &Publish) -> bool {
        let event = PresenceEvent::read(topic, &publish.payload, publish.retain, &self.own);
        event.map(|event| self.events.try_send(event)).is_some()
    }
}

/// Which other programs are online, and when the program publishes its states next.
#[derive(Debug, Default)]
pub struct Presence {
    online: BTreeSet<Participant>,
    is_connected: bool,
    /// When all states are published as retained: every [`REPUBLISH_INTERVAL`], or earlier for a correction.
    retained_due: Option<Instant>,
    transient_due: Option<Instant>,
    corrected: Option<Instant>,
    announced: Option<Instant>,
}

impl Presence {
    /// The program is connected, and publishes its states.
    pub fn connected(&mut self, now: Instant) {
        self.is_connected = true;
        self.retained_due = Some(now + REPUBLISH_INTERVAL);
    }

    /// The connection is lost: other programs may connect and disconnect unnoticed.
    pub fn disconnected(&mut self) {
        *self = Self { corrected: self.corrected, announced: self.announced, ..Self::default() };
    }

    /// Handles the status of another broker or worker; `retained` if the message was, so that its owner was online
    /// before. `jitter` is between 0 and 1.
    pub fn status(&mut self, party: Participant, online: bool, retained: bool, now: Instant, jitter: f64) {
        if !online {
            self.online.remove(&party);
        } else if self.online.len() < ONLINE_NAMES_MAX && self.online.insert(party) && !retained && self.is_connected {
            let earliest =
                self.announced.map_or(now, |announced| announced + CORRECTION_PAUSE).max(now + NEWCOMER_DELAY);
            self.transient_due.get_or_insert(earliest + NEWCOMER_SPREAD.mul_f64(jitter));
        }
    }

    /// A message under this program's name differs from the published state.
    pub fn on_wrong_retained(&mut self, now: Instant) {
        if self.is_connected {
            let earliest =
                self.corrected.map_or(now, |corrected| corrected + CORRECTION_PAUSE).max(now + CORRECTION_DELAY);
            self.retained_due = self.retained_due.map(|due| due.min(earliest));
        }
    }

    /// When [`Presence::next`] returns something, if nothing happens until then.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.retained_due.into_iter().chain(self.transient_due).min()
    }

    /// How the states have to be published now; none if they need not. A retained announcement replaces a due transient
    /// one.
    pub fn next(&mut self, now: Instant) -> Option<Announcement> {
        if self.retained_due.is_some_and(|due| due <= now) {
            (self.corrected, self.transient_due, self.retained_due) = (Some(now), None, Some(now + REPUBLISH_INTERVAL));
            return Some(Announcement::Retained);
        }
        self.transient_due.take_if(|due| *due <= now).map(|_| {
            self.announced = Some(now);
            Announcement::Transient
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn broker(name: &str) -> Participant {
        Participant::Broker(name.parse().unwrap())
    }

    fn worker(name: &str) -> Participant {
        Participant::Worker(name.parse().unwrap())
    }

    fn connected(now: Instant) -> Presence {
        let mut presence = Presence::default();
        presence.connected(now);
        presence
    }

    #[test]
    fn states_are_published_every_minute_while_connected() {
        let now = Instant::now();
        let mut presence = connected(now);
        assert_eq!(presence.next(now + REPUBLISH_INTERVAL.mul_f64(0.99)), None);
        assert_eq!(presence.next(now + REPUBLISH_INTERVAL), Some(Announcement::Retained));
        assert_eq!(presence.due(), Some(now + 2 * REPUBLISH_INTERVAL));
        presence.disconnected();
        assert_eq!((presence.due(), presence.next(now + 9 * REPUBLISH_INTERVAL)), (None, None));
    }

    #[test]
    fn states_are_published_once_for_each_new_program_and_once_for_many() {
        let now = Instant::now();
        let mut presence = connected(now);
        presence.status(worker("there"), true, true, now, 0.0);
        presence.status(worker("there"), true, false, now, 0.0);
        assert_eq!(presence.due(), Some(now + REPUBLISH_INTERVAL), "not for one that was there before");
        for n in 0..100 {
            presence.status(worker(&n.to_string()), true, false, now, 0.5);
        }
        let due = now + NEWCOMER_DELAY + NEWCOMER_SPREAD / 2;
        assert_eq!(presence.due(), Some(due));
        assert_eq!(presence.next(due), Some(Announcement::Transient));
        assert_eq!(presence.next(due), None);
        presence.status(worker("1"), false, false, due, 0.0);
        presence.status(broker("1"), true, false, due, 0.0);
        assert_eq!(presence.due(), Some(due + CORRECTION_PAUSE), "one after the other costs no more");
        presence.disconnected();
        presence.connected(due);
        presence.status(worker("there"), true, false, due, 0.0);
        assert!(presence.due() <= Some(due + CORRECTION_PAUSE), "nobody was known any more");
    }

    #[test]
    fn a_contradiction_is_corrected_at_once_and_two_programs_of_one_name_do_not_race() {
        let now = Instant::now();
        let mut presence = connected(now);
        presence.on_wrong_retained(now);
        presence.on_wrong_retained(now);
        assert_eq!(presence.next(now + CORRECTION_DELAY), Some(Announcement::Retained));
        presence.on_wrong_retained(now + CORRECTION_DELAY);
        assert_eq!(presence.due(), Some(now + CORRECTION_DELAY + CORRECTION_PAUSE));
    }

    #[test]
    fn a_message_on_an_own_topic_is_distinguished_from_another_programs_status() {
        let own = worker("own");
        let read = |topic: &str, payload: &[u8], retained| {
            PresenceEvent::read(&Topic::parse(topic).unwrap(), payload, retained, &own)
        };
        let status = |party, online, retained| Some(PresenceEvent::Status { party, online, retained });
        assert_eq!(read("wireguard-worker/a/status", b"1", true), status(worker("a"), true, true));
        assert_eq!(read("wireguard-broker/own/status", b"", false), status(broker("own"), false, false));
        for topic in ["wireguard-worker/own/status", "wireguard-worker/own/d/data", "wgkex/worker/own/hello"] {
            let heard = PresenceEvent::Own(Topic::parse(topic).unwrap(), b"0".to_vec());
            assert_eq!(read(topic, b"0", false), Some(heard));
            assert_eq!(read(topic, b"0", true), None, "it is from before");
        }
        let Some(PresenceEvent::Own(_, start)) = read("wgkex/worker/own/hello", &b"x".repeat(1 << 20), false) else {
            panic!("own")
        };
        assert_eq!(start.len(), OWN_MAX);
        for topic in ["wireguard-worker/a/d/data", "wireguard/d/all", "wgkex/worker/own/applied"] {
            assert_eq!(read(topic, b"1", false), None);
        }
    }

    proptest! {
        #[test]
        fn states_are_published_within_a_minute_of_any_event_and_not_for_ever(
            events in prop::collection::vec((0_u8..4, 0_u8..4, any::<bool>(), any::<bool>(), 0_u64..2000), 0..200),
        ) {
            let mut now = Instant::now();
            let (begun, mut announcements) = (now, 0_u32);
            let mut presence = connected(now);
            for (kind, name, online, retained, pause) in events {
                match kind {
                    0 => presence.on_wrong_retained(now),
                    1 => presence.status(broker(&name.to_string()), online, retained, now, 0.3),
                    _ => presence.status(worker(&name.to_string()), online, retained, now, 0.9),
                }
                now += Duration::from_millis(pause);
                prop_assert!(presence.due().is_some_and(|due| due <= now + REPUBLISH_INTERVAL));
                announcements += u32::from(presence.next(now).is_some());
            }
            let pauses = now.saturating_duration_since(begun).as_secs() / CORRECTION_PAUSE.as_secs();
            prop_assert!(u64::from(announcements) <= 2 * pauses + 2, "{announcements} in {pauses} pauses");
        }
    }
}
