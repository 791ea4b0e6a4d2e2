//! Catching up: who may lack keys asks a broker for them, page by page. Pages are answers to questions that say
//! where to go on, so a broker keeps nothing of them, and another one can go on where the first one died.
//!
//! Nobody trusts the MQTT server to have delivered everything: each asks again all the time, for what came since it
//! last asked; after a fault, and in a quiet fleet, it is the same question.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tracing::{debug, info};

use crate::message::{Page, Party, Question};
use crate::mqtt::{Bus, Link, Message};
use crate::{Domain, PublicKey, Topic};

/// Keys of a page at most: about 70 kB of JSON.
pub const PAGE: usize = 1000;
/// How often to ask for what came meanwhile.
const PERIOD: Duration = Duration::from_secs(10);
/// How long a page may take before another broker is asked.
const PATIENCE: Duration = Duration::from_secs(3);
/// What came shortly before the last round began is asked for again: it may have been under way.
const OVERLAP: Duration = Duration::from_secs(10);
/// Brokers that are remembered at most.
const BROKERS: usize = 4096;
/// Events that wait for the asker at most; more of them are asked for again.
const EVENTS: usize = 1024;

/// Which brokers are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// One of them, the same as long as it answers: they know the same.
    One,
    /// Each in its turn: that is how they come to know the same.
    Each,
}

/// Decides whom to ask for what. No IO, no clock.
#[derive(Debug)]
pub struct Asker {
    /// Who asks, and gets the pages.
    own: Party,
    manner: Manner,
    domains: Vec<Domain>,
    /// Every broker that answers questions.
    brokers: BTreeMap<String, Broker>,
    state: State,
    /// The question that found no answer in time. On a slow line it may still come, and is welcome while nobody
    /// else is asked: put again, it would take as long.
    overdue: Option<(Round, Question)>,
}

#[derive(Debug, Default)]
struct Broker {
    /// When the last round with it began that came to its end.
    asked: Option<Instant>,
    /// When it failed to answer.
    silent: Option<Instant>,
}

#[derive(Debug)]
enum State {
    /// Without a bus nobody is asked.
    Offline,
    /// The next round begins then.
    Resting { until: Instant },
    /// A question is out.
    Asking { round: Round, question: Question, since: Instant },
    /// The next question of this round is to be put.
    Ready { round: Round, question: Question },
}

#[derive(Debug, Clone)]
struct Round {
    broker: String,
    begun: Instant,
    younger_than: Option<u64>,
    /// Index of the domain that is asked for.
    domain: usize,
}

impl Asker {
    /// An asker for `domains` in the name of `own`.
    #[must_use]
    pub fn new(own: Party, manner: Manner, domains: impl IntoIterator<Item = Domain>) -> Self {
        let domains = domains.into_iter().collect();
        Self { own, manner, domains, brokers: BTreeMap::new(), state: State::Offline, overdue: None }
    }

    /// A broker says that it answers questions, or that it no longer does.
    pub fn broker(&mut self, name: &str, answers: bool, now: Instant) {
        if matches!(&self.own, Party::Broker(own) if own == name) {
            return;
        }
        if answers && (self.brokers.len() < BROKERS || self.brokers.contains_key(name)) {
            let broker = self.brokers.entry(name.to_owned()).or_default();
            broker.silent = None;
            if broker.asked.is_none()
                && let State::Resting { until } = &mut self.state
            {
                *until = now;
            }
        } else if let Some(broker) = self.brokers.get_mut(name) {
            broker.silent = Some(now);
        }
    }

    /// The bus can be used: what was missed meanwhile is asked for at once.
    pub fn online(&mut self, now: Instant) {
        self.state = State::Resting { until: now };
    }

    /// The bus is lost, and with it whatever was asked.
    pub fn offline(&mut self) {
        self.state = State::Offline;
        self.overdue = None;
    }

    /// When there is something to do next, if nothing is heard until then.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        match &self.state {
            State::Offline => None,
            State::Ready { round, .. } => Some(round.begun),
            State::Resting { until } => Some(*until),
            State::Asking { since, .. } => Some(*since + PATIENCE),
        }
    }

    /// The question to put now, and to whom.
    pub fn ask(&mut self, now: Instant) -> Option<(String, Question)> {
        if let State::Asking { round, question, since } = &self.state
            && now >= *since + PATIENCE
        {
            let broker = round.broker.clone();
            self.overdue = Some((round.clone(), question.clone()));
            debug!(broker, "broker does not answer a question for keys");
            self.brokers.entry(broker).or_default().silent = Some(now);
            self.state = State::Resting { until: now };
        }
        if let State::Resting { until } = self.state
            && now >= until
        {
            self.state = match self.next_broker(now) {
                Some(broker) => self.begin(broker, now),
                None => State::Resting { until: now + PERIOD },
            };
        }
        if let State::Ready { round, question } = &self.state {
            let (broker, question) = (round.broker.clone(), question.clone());
            self.state = State::Asking { round: round.clone(), question: question.clone(), since: now };
            return Some((broker, question));
        }
        None
    }

    /// The broker for the next round: one that answers, else the one whose silence is longest ago.
    fn next_broker(&self, now: Instant) -> Option<String> {
        let forgiven = |silent: Instant| now.saturating_duration_since(silent) > 3 * PERIOD;
        let candidates = self.brokers.iter().filter(|(_, broker)| broker.silent.is_none_or(forgiven));
        let rank = |name: &str, broker: &Broker| match self.manner {
            // The one it knows best is the one that it asked last.
            Manner::One => (
                broker.asked.map_or(u128::MAX, |asked| now.duration_since(asked).as_nanos()),
                spread(name, self.own.name()),
            ),
            Manner::Each => (broker.asked.map_or(0, |asked| u128::MAX - now.duration_since(asked).as_nanos()), 0),
        };
        candidates.min_by_key(|(name, broker)| rank(name, broker)).map(|(name, _)| name.clone())
    }

    fn begin(&self, broker: String, now: Instant) -> State {
        let asked = self.brokers.get(&broker).and_then(|broker| broker.asked);
        let younger_than = asked.map(|asked| (now.saturating_duration_since(asked) + OVERLAP).as_secs() + 1);
        self.go_on(Round { broker, begun: now, younger_than, domain: 0 }, None)
    }

    /// The next question of a round, or its end.
    fn go_on(&self, round: Round, after: Option<PublicKey>) -> State {
        let Some(domain) = self.domains.get(round.domain) else {
            return State::Resting { until: round.begun + PERIOD };
        };
        let question = Question {
            from: self.own.clone(),
            domain: domain.name().to_owned(),
            after,
            younger_than: round.younger_than,
        };
        State::Ready { round, question }
    }

    /// Whether `page` answers the question that is out. If so the next one is due, once its keys are taken.
    pub fn hear(&mut self, page: &Page) -> bool {
        let (round, question) = match (&self.state, &self.overdue) {
            (State::Asking { round, question, .. }, _) | (State::Resting { .. }, Some((round, question))) => {
                (round, question)
            }
            _ => return false,
        };
        let fits = page.broker == round.broker && page.domain == question.domain && page.after == question.after;
        if !fits || page.keys.len() > PAGE {
            return false;
        }
        let mut round = round.clone();
        let last = page.keys.keys().next_back().copied();
        let after = last.filter(|last| page.more && question.after.is_none_or(|after| after < *last));
        if after.is_none() {
            round.domain += 1;
        }
        if round.domain >= self.domains.len() {
            self.brokers.entry(round.broker.clone()).or_default().asked = Some(round.begun);
        }
        if let Some(broker) = self.brokers.get_mut(&round.broker) {
            broker.silent = None;
        }
        self.overdue = None;
        self.state = self.go_on(round, after);
        true
    }

    /// The domain with this name, if it is one of those asked for.
    fn domain(&self, name: &str) -> Option<&Domain> {
        self.domains.iter().find(|domain| domain.name() == name)
    }
}

/// Spreads many askers over brokers that they know equally well (FNV-1a).
fn spread(broker: &str, asker: &str) -> u64 {
    let bytes = broker.bytes().chain([0]).chain(asker.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What an asker hears on the bus.
#[derive(Debug)]
pub enum Heard {
    /// A broker answers questions, or no longer does.
    Broker(String, bool),
    /// An answer.
    Page(Page),
}

/// A way to let an asker hear; one too many is dropped.
pub type Ears = mpsc::Sender<Heard>;

/// A way to let an asker hear, and the other end of it.
#[must_use]
pub fn ears() -> (Ears, mpsc::Receiver<Heard>) {
    mpsc::channel(EVENTS)
}

/// Asks on `bus` as `asker` decides, and has the keys of each page taken before it asks for the next one. Ends with the bus.
pub async fn run<F: Future<Output = ()>>(
    mut asker: Asker,
    bus: Bus,
    mut heard: mpsc::Receiver<Heard>,
    mut take: impl FnMut(Domain, Page) -> F,
) {
    let mut link = bus.link();
    loop {
        let now = Instant::now();
        if let Some((broker, question)) = asker.ask(now) {
            if question.younger_than.is_none() && question.after.is_none() {
                info!(broker, domain = question.domain, "asking for all live keys");
            }
            let payload = serde_json::to_vec(&question).unwrap_or_default();
            // One that is lost is put again.
            let _ = bus.post(Message::event(Topic::Questions { broker }, payload));
        }
        let due = asker.due();
        tokio::select! {
            changed = link.changed() => {
                if changed.is_err() {
                    return;
                }
                let up = *link.borrow_and_update() == Link::Up;
                if up { asker.online(Instant::now()) } else { asker.offline() }
            }
            event = heard.recv() => match event {
                Some(Heard::Broker(name, answers)) => asker.broker(&name, answers, Instant::now()),
                Some(Heard::Page(page)) => {
                    if asker.hear(&page) && let Some(domain) = asker.domain(&page.domain).cloned() {
                        take(domain, page).await;
                    }
                }
                None => return,
            },
            () = sleep_until(due.unwrap_or_else(|| now + PERIOD).into()) => {}
        }
    }
}

#[cfg(test)]
mod tests;
