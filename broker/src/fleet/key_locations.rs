//! At which gateways a key is, as far as they published it, and which one this broker named to its router, in a few bytes per
//! key: for operators, and for the choice of a gateway. No IO, no clock.
//!
//! The messages of a worker about keys may be false. For the choice they count only where this broker's own answers
//! agree: a worker can neither keep nor attract routers that this broker sent elsewhere.

use std::num::{NonZeroU8, NonZeroU16};
use std::time::{Duration, Instant};

use wgkex_common::WorkerName;

/// The most gateways that get a number; messages of others about keys are not remembered.
const NUMBERED_GATEWAYS_MAX: usize = 64;
/// A router that requests a gateway again so soon after it was sent back to its gateway is not connected there.
const STAY_RETRY_MINUTES: u16 = 5;

/// The gateways that have published anything of keys, each with a number.
#[derive(Debug)]
pub struct GatewayIndex {
    begun: Instant,
    names: Vec<WorkerName>,
}

/// The gateways of a key, by their numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLocations {
    /// A bit for each gateway that has it, as far as it published that.
    confirmed: u64,
    /// When one published that last, in seconds.
    confirmed_at: u32,
    /// The gateway that last reported handshakes, counted from 1.
    handshakes: Option<NonZeroU8>,
    /// The gateway that this broker last named to the router, counted from 1.
    answered: Option<NonZeroU8>,
    /// When that was where the router was connected by then, in minutes of a clock that starts anew after 45 days.
    sent_back_at: Option<NonZeroU16>,
}

/// The gateways of a key, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamedLocations {
    /// The gateways that have it, as far as they published that since this broker started.
    pub confirmed: Vec<WorkerName>,
    /// How long ago one published that.
    pub confirmed_ago: Option<Duration>,
    /// The one that last reported handshakes.
    pub handshakes: Option<WorkerName>,
}

impl GatewayIndex {
    /// No gateway has a number yet.
    #[must_use]
    pub fn new(begun: Instant) -> Self {
        Self { begun, names: Vec::new() }
    }

    /// The number of a gateway counted from 1, a new one if there is room.
    fn ordinal(&mut self, worker: &WorkerName) -> Option<NonZeroU8> {
        self.number(worker).and_then(|number| u8::try_from(number + 1).ok()).and_then(NonZeroU8::new)
    }

    fn name(&self, number: Option<NonZeroU8>) -> Option<&WorkerName> {
        self.names.get(usize::from(number?.get()) - 1)
    }

    /// The minutes since it began, from 1 to 65535 and then from 1 again.
    fn minute(&self, now: Instant) -> NonZeroU16 {
        let minutes = now.saturating_duration_since(self.begun).as_secs() / 60;
        let minute = u16::try_from(minutes % u64::from(u16::MAX)).unwrap_or_default();
        NonZeroU16::MIN.saturating_add(minute)
    }

    /// The number of a gateway, a new one if there is room.
    fn number(&mut self, worker: &WorkerName) -> Option<usize> {
        let found = self.names.iter().position(|name| name == worker);
        found.or_else(|| {
            (self.names.len() < NUMBERED_GATEWAYS_MAX).then(|| {
                self.names.push(worker.clone());
                self.names.len() - 1
            })
        })
    }

    /// `worker` has published whether it has the key.
    pub fn confirm(&mut self, locations: &mut KeyLocations, worker: &WorkerName, is_installed: bool, now: Instant) {
        let Some(number) = self.number(worker) else { return };
        if is_installed {
            locations.confirmed |= 1 << number;
            let at = now.saturating_duration_since(self.begun).as_secs();
            locations.confirmed_at = u32::try_from(at).unwrap_or(u32::MAX);
        } else {
            locations.confirmed &= !(1 << number);
        }
    }

    /// `worker` has reported handshakes of the key.
    pub fn on_handshake(&mut self, locations: &mut KeyLocations, worker: &WorkerName) {
        if let Some(number) = self.ordinal(worker) {
            locations.handshakes = Some(number);
        }
    }

    /// This broker named `worker` to the router.
    pub fn on_answer(&mut self, locations: &mut KeyLocations, worker: &WorkerName, now: Instant) {
        let stays = self.current_gateway(locations, now) == Some(worker);
        locations.answered = self.ordinal(worker);
        locations.sent_back_at = stays.then(|| self.minute(now));
    }

    /// The gateway where the router is connected: this broker named it to the router, and it is the one that last reported
    /// handshakes. None for a router that requests one again soon after it was sent back there.
    #[must_use]
    pub fn current_gateway(&self, locations: &KeyLocations, now: Instant) -> Option<&WorkerName> {
        let is_recent = |at: NonZeroU16| {
            let minute = self.minute(now).get();
            // The minutes start again at 1, and never are 0.
            let passed = if minute >= at.get() { minute - at.get() } else { minute + (u16::MAX - at.get()) };
            passed < STAY_RETRY_MINUTES
        };
        let is_current = locations.answered == locations.handshakes && !locations.sent_back_at.is_some_and(is_recent);
        self.name(locations.answered.filter(|_| is_current))
    }

    /// The gateway that last reported handshakes of a key.
    #[must_use]
    pub fn last_with_handshakes(&self, locations: &KeyLocations) -> Option<&WorkerName> {
        self.name(locations.handshakes)
    }

    /// The gateways of a key.
    #[must_use]
    pub fn named(&self, locations: &KeyLocations, now: Instant) -> NamedLocations {
        let KeyLocations { confirmed, confirmed_at, .. } = *locations;
        let is_confirmed = |(number, _): &(usize, &WorkerName)| confirmed & (1 << number) != 0;
        let at = self.begun + Duration::from_secs(confirmed_at.into());
        NamedLocations {
            confirmed: self.names.iter().enumerate().filter(is_confirmed).map(|(_, name)| name.clone()).collect(),
            confirmed_ago: (confirmed != 0).then(|| now.saturating_duration_since(at)),
            handshakes: self.last_with_handshakes(locations).cloned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(n: usize) -> WorkerName {
        format!("gw{n}").parse().unwrap()
    }

    #[test]
    fn the_locations_of_a_key_are_those_that_gateways_published_last() {
        let begun = Instant::now();
        let (mut numbers, mut locations) = (GatewayIndex::new(begun), KeyLocations::default());
        assert_eq!(numbers.named(&locations, begun), NamedLocations::default());
        let at = |seconds| begun + Duration::from_secs(seconds);
        numbers.confirm(&mut locations, &worker(1), true, at(10));
        numbers.confirm(&mut locations, &worker(2), true, at(12));
        numbers.on_handshake(&mut locations, &worker(3));
        numbers.on_handshake(&mut locations, &worker(2));
        numbers.confirm(&mut locations, &worker(1), false, at(20));
        let named = numbers.named(&locations, at(22));
        assert_eq!((named.confirmed, named.handshakes), (vec![worker(2)], Some(worker(2))));
        assert_eq!(named.confirmed_ago, Some(Duration::from_secs(10)));
    }

    #[test]
    fn a_router_is_connected_where_this_broker_sent_it_and_the_gateway_reports_it() {
        let begun = Instant::now();
        let (mut numbers, mut locations) = (GatewayIndex::new(begun), KeyLocations::default());
        numbers.on_handshake(&mut locations, &worker(2));
        assert_eq!(numbers.current_gateway(&locations, begun), None, "only the gateway claims it");
        numbers.on_answer(&mut locations, &worker(1), begun);
        assert_eq!(numbers.current_gateway(&locations, begun), None, "another one claims it");
        numbers.on_handshake(&mut locations, &worker(1));
        assert_eq!(numbers.current_gateway(&locations, begun), Some(&worker(1)));
        numbers.on_handshake(&mut locations, &worker(2));
        assert_eq!(numbers.current_gateway(&locations, begun), None, "it may have moved");
        numbers.on_handshake(&mut locations, &worker(1));
        numbers.on_answer(&mut locations, &worker(2), begun);
        assert_eq!(numbers.current_gateway(&locations, begun), None, "it was sent elsewhere");
    }

    #[test]
    fn a_router_that_was_sent_back_and_requests_again_soon_has_no_current_gateway() {
        let begun = Instant::now();
        // Also where the clock of minutes begins anew.
        for first in [0, 65_532, 65_534, 65_535, 131_069] {
            let (mut numbers, mut locations) = (GatewayIndex::new(begun), KeyLocations::default());
            let at = |minutes: u64| begun + Duration::from_secs(60 * (first + minutes));
            numbers.on_handshake(&mut locations, &worker(1));
            numbers.on_answer(&mut locations, &worker(1), at(0));
            assert_eq!(
                numbers.current_gateway(&locations, at(0)),
                Some(&worker(1)),
                "its first request since it is connected"
            );
            numbers.on_answer(&mut locations, &worker(1), at(0));
            let are_current =
                [0, 1, 4, 5, 90].map(|minutes| numbers.current_gateway(&locations, at(minutes)).is_some());
            assert_eq!(are_current, [false, false, false, true, true], "{first}");
        }
    }

    #[test]
    fn however_many_gateways_there_are_the_room_is_bounded() {
        let (mut numbers, mut locations) = (GatewayIndex::new(Instant::now()), KeyLocations::default());
        for n in 0..NUMBERED_GATEWAYS_MAX + 10 {
            numbers.confirm(&mut locations, &worker(n), true, Instant::now());
            numbers.on_handshake(&mut locations, &worker(n));
        }
        let named = numbers.named(&locations, Instant::now());
        assert_eq!((numbers.names.len(), named.confirmed.len()), (NUMBERED_GATEWAYS_MAX, NUMBERED_GATEWAYS_MAX));
        assert_eq!(named.handshakes, Some(worker(NUMBERED_GATEWAYS_MAX - 1)));
        assert_eq!(size_of::<KeyLocations>(), 16);
    }
}
