//! Who asks for keys on topics of their own. What is asked in their name where anybody may ask is somebody else's: the
//! pages would go to who did not want them. Programs of older versions ask there, and are served.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use wgkex_common::wire::message::{Hello, Participant, SyncRequest};
use wgkex_common::{BrokerName, WorkerName};

/// A worker asks every 10 seconds. One that has not for so long may be of an older version now.
const LATELY: Duration = Duration::from_secs(60);
/// Workers and brokers that are remembered at most.
const MOST: usize = 4096;

/// Those who ask on topics that nobody else may publish on, and where questions go that are answered.
#[derive(Debug)]
pub struct Askers {
    /// The broker that is asked.
    own: BrokerName,
    questions: mpsc::Sender<SyncRequest>,
    /// When each worker last asked.
    workers: BTreeMap<WorkerName, Instant>,
    brokers: BTreeSet<BrokerName>,
}

impl Askers {
    /// Nobody has asked the broker `own` yet.
    #[must_use]
    pub fn new(own: BrokerName, questions: mpsc::Sender<SyncRequest>) -> Self {
        Self { own, questions, workers: BTreeMap::new(), brokers: BTreeSet::new() }
    }

    /// A question on a topic on which only this worker may publish; all brokers hear it.
    pub fn by_worker(&mut self, worker: &WorkerName, question: SyncRequest) -> Result<(), &'static str> {
        if !matches!(&question.from, Participant::Worker(from) if from == worker) {
            return Err("payload");
        }
        self.asked(worker, Instant::now());
        if question.to.as_ref() == Some(&self.own) {
            self.answer(question);
        }
        Ok(())
    }

    /// One on a topic on which only brokers may publish.
    pub fn by_broker(&self, question: SyncRequest) -> Result<(), &'static str> {
        if !matches!(question.from, Participant::Broker(_)) {
            return Err("payload");
        }
        self.answer(question);
        Ok(())
    }

    /// One on the topic of older versions, which may be in another's name.
    pub fn by_anybody(&self, question: SyncRequest) -> Result<(), &'static str> {
        if !self.may_ask_anywhere(&question.from, Instant::now()) {
            return Err("payload");
        }
        self.answer(question);
        Ok(())
    }

    fn answer(&self, question: SyncRequest) {
        // What finds no place is asked again.
        let _ = self.questions.try_send(question);
    }

    fn asked(&mut self, worker: &WorkerName, now: Instant) {
        if self.workers.len() >= MOST && !self.workers.contains_key(worker) {
            self.workers.retain(|_, asked| is_lately(*asked, now));
        }
        if self.workers.len() < MOST || self.workers.contains_key(worker) {
            self.workers.insert(worker.clone(), now);
        }
    }

    /// A broker says what it can do, or that it goes.
    pub fn broker(&mut self, broker: &BrokerName, hello: Option<&Hello>) {
        if !hello.is_some_and(Hello::names_questions) {
            self.brokers.remove(broker);
        } else if self.brokers.len() < MOST {
            self.brokers.insert(broker.clone());
        }
    }

    /// Whether a question that anybody may have asked is answered.
    fn may_ask_anywhere(&self, from: &Participant, now: Instant) -> bool {
        match from {
            Participant::Worker(worker) => self.workers.get(worker).is_none_or(|asked| !is_lately(*asked, now)),
            Participant::Broker(broker) => !self.brokers.contains(broker),
        }
    }
}

fn is_lately(asked: Instant, now: Instant) -> bool {
    now.saturating_duration_since(asked) < LATELY
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    fn askers() -> (Askers, mpsc::Receiver<SyncRequest>) {
        let (sender, questions) = mpsc::channel(10);
        (Askers::new("own".parse().unwrap(), sender), questions)
    }

    fn question(from: Participant, to: Option<&str>) -> SyncRequest {
        SyncRequest { from, to: to.map(|to| to.parse().unwrap()), domain: "d".into(), after: None, younger_than: None }
    }

    #[test]
    fn a_question_is_answered_to_who_asked() {
        let (mut askers, mut questions) = askers();
        let [worker, other, broker] = [
            Participant::Worker(name("gw")),
            Participant::Worker(name("x")),
            Participant::Broker("b".parse().unwrap()),
        ];
        let mut is_answered = |result: Result<(), &str>| (result.is_ok(), questions.try_recv().is_ok());
        assert_eq!(is_answered(askers.by_worker(&name("gw"), question(worker.clone(), Some("own")))), (true, true));
        assert_eq!(
            is_answered(askers.by_worker(&name("gw"), question(worker.clone(), Some("another")))),
            (true, false)
        );
        assert_eq!(is_answered(askers.by_worker(&name("gw"), question(other.clone(), Some("own")))), (false, false));
        assert_eq!(is_answered(askers.by_broker(question(broker, None))), (true, true));
        assert_eq!(is_answered(askers.by_broker(question(other.clone(), None))), (false, false));
        assert_eq!(is_answered(askers.by_anybody(question(other, None))), (true, true));
        assert_eq!(is_answered(askers.by_anybody(question(worker, None))), (false, false));
        let no_name = r#"{"from":{"worker":"a/b"},"domain":"d","after":null,"younger_than":null}"#;
        assert!(serde_json::from_str::<SyncRequest>(no_name).is_err());
    }

    #[test]
    fn who_asks_on_a_topic_of_its_own_does_not_ask_elsewhere() {
        let ((mut askers, _questions), now) = (askers(), Instant::now());
        let [new, old] = ["new", "old"].map(|name| Participant::Worker(self::name(name)));
        askers.asked(&name("new"), now);
        let asked = |askers: &Askers, from, seconds| askers.may_ask_anywhere(from, now + Duration::from_secs(seconds));
        assert!(!asked(&askers, &new, 59) && asked(&askers, &old, 0));
        assert!(asked(&askers, &new, 60), "an older version has taken its place");
        let new_broker: BrokerName = "new".parse().unwrap();
        let broker = Participant::Broker(new_broker.clone());
        assert!(askers.may_ask_anywhere(&broker, now));
        askers.broker(&new_broker, Some(&Hello::broker(Vec::new(), 1)));
        assert!(!askers.may_ask_anywhere(&broker, now));
        askers.broker(
            &new_broker,
            Some(&Hello { capabilities: vec![Hello::ANSWER.into()], ..Hello::broker(Vec::new(), 2) }),
        );
        assert!(askers.may_ask_anywhere(&broker, now));
    }

    #[test]
    fn no_more_are_remembered_than_there_can_be() {
        let ((mut askers, _questions), now) = (askers(), Instant::now());
        for n in 0..2 * MOST {
            askers.asked(&name(&n.to_string()), now);
            askers.broker(&n.to_string().parse().unwrap(), Some(&Hello::broker(Vec::new(), 1)));
        }
        assert_eq!((askers.workers.len(), askers.brokers.len()), (MOST, MOST));
        askers.asked(&name("later"), now + LATELY);
        assert_eq!(askers.workers.len(), 1);
    }
}
