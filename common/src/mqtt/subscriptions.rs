//! The filters that the server has granted, and when refused ones are requested again. No IO, no clock.

use std::time::Duration;

use rumqttc::{QoS, SubscribeFilter, SubscribeReasonCode};
use tokio::time::Instant;

/// How long the server may take to answer a SUBSCRIBE.
const SUBACK_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause before refused filters are requested again; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
/// The longest pause.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// The filters of a session.
#[derive(Debug)]
pub(super) struct Subscriptions {
    all: Vec<Subscription>,
    /// The filters that the server has not answered yet, by index, and when they were requested.
    asked: Option<(Vec<usize>, Instant)>,
    /// When refused filters are requested again.
    retry: Option<Instant>,
    pause: Duration,
}

/// A filter of a session.
#[derive(Debug, Clone)]
pub(super) struct Filter {
    /// The text of the filter.
    pub text: String,
    pub qos: QoS,
    /// The session cannot be used without it.
    pub is_required: bool,
}

#[derive(Debug)]
struct Subscription {
    filter: Filter,
    is_granted: bool,
    /// It was refused, and that is logged.
    is_reported: bool,
}

impl Subscriptions {
    /// None of them is granted yet.
    pub(super) fn new(filters: impl IntoIterator<Item = Filter>) -> Self {
        let all = filters.into_iter().map(|filter| Subscription { filter, is_granted: false, is_reported: false });
        Self { all: all.collect(), asked: None, retry: None, pause: RETRY_MIN }
    }

    pub(super) fn filters(&self) -> impl Iterator<Item = &Filter> {
        self.all.iter().map(|subscription| &subscription.filter)
    }

    /// A connection begins or ends: the server has no subscriptions.
    pub(super) fn reset(&mut self) {
        (self.asked, self.retry, self.pause) = (None, None, RETRY_MIN);
        self.all.iter_mut().for_each(|subscription| subscription.is_granted = false);
    }

    /// The filters to request now, if any.
    pub(super) fn next(&mut self, now: Instant) -> Option<Vec<SubscribeFilter>> {
        if self.asked.is_some() || self.retry.is_some_and(|retry| now < retry) {
            return None;
        }
        let missing = self.all.iter().enumerate().filter(|(_, subscription)| !subscription.is_granted);
        let missing: Vec<_> = missing.map(|(index, _)| index).collect();
        if missing.is_empty() {
            return None;
        }
        let filters = missing.iter().map(|&index| &self.all[index].filter);
        let filters = filters.map(|filter| SubscribeFilter::new(filter.text.clone(), filter.qos)).collect();
        self.asked = Some((missing, now));
        Some(filters)
    }

    /// The server's answer. Returns the newly refused filters.
    pub(super) fn answered(&mut self, codes: &[SubscribeReasonCode], now: Instant) -> Vec<String> {
        let Some((asked, _)) = self.asked.take() else { return Vec::new() };
        let mut newly_refused = Vec::new();
        for (place, index) in asked.into_iter().enumerate() {
            let subscription = &mut self.all[index];
            subscription.is_granted = matches!(codes.get(place), Some(SubscribeReasonCode::Success(_)));
            if !subscription.is_granted && !subscription.is_reported {
                newly_refused.push(subscription.filter.text.clone());
            }
            subscription.is_reported = !subscription.is_granted;
        }
        let are_all_granted = self.all.iter().all(|subscription| subscription.is_granted);
        self.retry = (!are_all_granted).then(|| now + self.pause);
        self.pause = (self.pause * 2).min(RETRY_MAX);
        newly_refused
    }

    /// Whether all required filters are granted.
    pub(super) fn is_complete(&self) -> bool {
        self.all.iter().all(|subscription| subscription.is_granted || !subscription.filter.is_required)
    }

    /// Whether this filter is granted.
    pub(super) fn is_granted(&self, wanted: &str) -> bool {
        self.all.iter().any(|subscription| subscription.is_granted && subscription.filter.text == wanted)
    }

    /// A required filter that is refused.
    pub(super) fn refused(&self) -> Option<&str> {
        let mut refused = self.all.iter().filter(|subscription| !subscription.is_granted && subscription.is_reported);
        refused.find_map(|Subscription { filter, .. }| filter.is_required.then_some(filter.text.as_str()))
    }

    /// Whether the server's answer is overdue.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.asked.as_ref().is_some_and(|(_, since)| now.saturating_duration_since(*since) >= SUBACK_TIMEOUT)
    }

    /// When a request or the answer is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.asked.as_ref().map(|(_, since)| *since + SUBACK_TIMEOUT).or(self.retry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANTED: SubscribeReasonCode = SubscribeReasonCode::Success(QoS::AtMostOnce);
    const REFUSED: SubscribeReasonCode = SubscribeReasonCode::Failure;

    fn subscriptions() -> Subscriptions {
        let all = [("a", true), ("b", true), ("c", false)];
        let filter = |(text, is_required): (&str, _)| Filter { text: text.into(), qos: QoS::AtMostOnce, is_required };
        Subscriptions::new(all.map(filter))
    }

    fn asked(subscriptions: &mut Subscriptions, now: Instant) -> Vec<String> {
        subscriptions.next(now).into_iter().flatten().map(|filter| filter.path).collect()
    }

    #[test]
    fn only_refused_filters_are_subscribed_again_with_growing_pauses() {
        let (mut subscriptions, now) = (subscriptions(), Instant::now());
        assert_eq!(asked(&mut subscriptions, now), ["a", "b", "c"]);
        assert_eq!(asked(&mut subscriptions, now), [""; 0], "one SUBSCRIBE at a time");
        assert_eq!(subscriptions.answered(&[GRANTED, REFUSED, REFUSED], now), ["b", "c"]);
        assert_eq!((subscriptions.is_complete(), subscriptions.refused()), (false, Some("b")));
        let (mut now, mut pauses) = (now, Vec::new());
        for _ in 0..8 {
            let due = subscriptions.due().unwrap();
            pauses.push(due.duration_since(now).as_secs());
            now = due;
            assert_eq!(asked(&mut subscriptions, now), ["b", "c"]);
            assert_eq!(subscriptions.answered(&[REFUSED, REFUSED], now), [""; 0], "the log says it once");
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(asked(&mut subscriptions, now + RETRY_MAX), ["b", "c"]);
        subscriptions.answered(&[GRANTED, REFUSED], now);
        assert!(subscriptions.is_complete() && !subscriptions.is_granted("c"), "it does without c");
        assert_eq!(asked(&mut subscriptions, now + 2 * RETRY_MAX), ["c"], "and still asks for it");
        subscriptions.reset();
        assert_eq!(asked(&mut subscriptions, now), ["a", "b", "c"]);
    }

    #[test]
    fn an_answer_that_is_too_short_refuses_and_one_that_does_not_come_is_overdue() {
        let (mut subscriptions, now) = (subscriptions(), Instant::now());
        subscriptions.next(now);
        assert!(!subscriptions.is_overdue(now) && subscriptions.is_overdue(now + SUBACK_TIMEOUT));
        assert_eq!(subscriptions.due(), Some(now + SUBACK_TIMEOUT));
        assert_eq!(subscriptions.answered(&[GRANTED], now), ["b", "c"]);
        assert_eq!(subscriptions.answered(&[GRANTED; 3], now), [""; 0], "nobody asked");
        assert!(!subscriptions.is_complete());
    }
}
