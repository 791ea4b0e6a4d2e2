//! The last answers to keys that come oftener than they may, so that each is told again and costs nothing. No IO, no
//! clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use wgkex_common::{Domain, PublicKey};

/// How long an answer can be told again: what it says of gateways may be another by then.
const FRESH: Duration = Duration::from_secs(3);
/// Answers at most; for more keys nothing is told again.
const MOST: usize = 4_096;

/// The answers, by key.
#[derive(Debug, Default)]
pub struct Answers {
    told: BTreeMap<(Domain, PublicKey), Told>,
}

/// That a key was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    since: Instant,
    /// The gateway that was named to it; none if none was.
    pub worker: Option<String>,
}

impl Answers {
    /// Keeps that `key` was taken in; and which gateway was named to it, if one was.
    pub fn keep(&mut self, domain: &Domain, key: PublicKey, worker: Option<String>, now: Instant) {
        if self.told.len() >= MOST {
            self.told.retain(|_, told| told.is_fresh(now));
        }
        if self.told.len() < MOST {
            self.told.insert((domain.clone(), key), Told { since: now, worker });
        }
    }

    /// What `key` was told, if that is not long ago.
    #[must_use]
    pub fn last(&self, domain: &Domain, key: PublicKey, now: Instant) -> Option<&Told> {
        self.told.get(&(domain.clone(), key)).filter(|told| told.is_fresh(now))
    }
}

impl Told {
    fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) < FRESH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> PublicKey {
        let mut bytes = [0x42; 32];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        PublicKey::from_bytes(bytes).unwrap()
    }

    #[test]
    fn an_answer_is_told_again_while_it_is_fresh_and_to_nobody_else() {
        let [a, b] = ["ff_a", "ff_b"].map(|name| Domain::new(name, &["ff_".into()]).unwrap());
        let (mut answers, now) = (Answers::default(), Instant::now());
        answers.keep(&a, key(1), Some("gw1".into()), now);
        answers.keep(&a, key(2), None, now);
        let soon = now + FRESH.mul_f64(0.99);
        assert_eq!(answers.last(&a, key(1), soon), Some(&Told { since: now, worker: Some("gw1".into()) }));
        assert_eq!(answers.last(&a, key(2), soon), Some(&Told { since: now, worker: None }));
        assert_eq!(answers.last(&b, key(1), soon), None);
        assert_eq!(answers.last(&a, key(1), now + FRESH), None);
    }

    #[test]
    fn there_are_only_so_many() {
        let domain = Domain::new("ff_a", &["ff_".into()]).unwrap();
        let (mut answers, now) = (Answers::default(), Instant::now());
        let most = u32::try_from(MOST).unwrap();
        for n in 0..most + 10 {
            answers.keep(&domain, key(n), None, now);
        }
        assert_eq!(answers.told.len(), MOST);
        assert_eq!(answers.last(&domain, key(most), now), None);
        answers.keep(&domain, key(most), None, now + FRESH);
        assert_eq!(answers.told.len(), 1);
    }
}
