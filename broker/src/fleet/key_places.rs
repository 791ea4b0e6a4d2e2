//! At which gateways a key is, as far as they published it: for operators, in a few bytes per key. No IO, no clock.

use std::num::NonZeroU8;
use std::time::{Duration, Instant};

use wgkex_common::WorkerName;

/// The most gateways that are told apart; what others publish of keys is not remembered.
const MAX_GATEWAYS: usize = 64;

/// The gateways that have published anything of keys, each with a number.
#[derive(Debug)]
pub struct GatewayNumbers {
    begun: Instant,
    names: Vec<WorkerName>,
}

/// The gateways of a key, by their numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyPlaces {
    /// A bit for each gateway that has it, as far as it published that.
    confirmed: u64,
    /// When one published that last, in seconds.
    confirmed_at: u32,
    /// The gateway that last reported handshakes, counted from 1.
    handshakes: Option<NonZeroU8>,
}

/// The gateways of a key, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamedPlaces {
    /// Those that have it, as far as they published that since this broker started.
    pub confirmed: Vec<WorkerName>,
    /// How long ago one published that.
    pub confirmed_ago: Option<Duration>,
    /// The one that last reported handshakes.
    pub handshakes: Option<WorkerName>,
}

impl GatewayNumbers {
    /// No gateway has a number yet.
    #[must_use]
    pub fn new(begun: Instant) -> Self {
        Self { begun, names: Vec::new() }
    }

    /// The number of a gateway, a new one if there is room.
    fn number(&mut self, worker: &WorkerName) -> Option<usize> {
        let found = self.names.iter().position(|name| name == worker);
        found.or_else(|| {
            (self.names.len() < MAX_GATEWAYS).then(|| {
                self.names.push(worker.clone());
                self.names.len() - 1
            })
        })
    }

    /// `worker` has published whether it has the key.
    pub fn confirm(&mut self, places: &mut KeyPlaces, worker: &WorkerName, is_installed: bool, now: Instant) {
        let Some(number) = self.number(worker) else { return };
        if is_installed {
            places.confirmed |= 1 << number;
            let at = now.saturating_duration_since(self.begun).as_secs();
            places.confirmed_at = u32::try_from(at).unwrap_or(u32::MAX);
        } else {
            places.confirmed &= !(1 << number);
        }
    }

    /// `worker` has reported handshakes of the key.
    pub fn on_handshake(&mut self, places: &mut KeyPlaces, worker: &WorkerName) {
        let number = self.number(worker).and_then(|number| u8::try_from(number + 1).ok());
        if let Some(number) = number {
            places.handshakes = NonZeroU8::new(number);
        }
    }

    /// The gateway that last reported handshakes of a key.
    #[must_use]
    pub fn last_with_handshakes(&self, places: &KeyPlaces) -> Option<&WorkerName> {
        self.names.get(usize::from(places.handshakes?.get()) - 1)
    }

    /// The gateways of a key.
    #[must_use]
    pub fn named(&self, places: &KeyPlaces, now: Instant) -> NamedPlaces {
        let KeyPlaces { confirmed, confirmed_at, .. } = *places;
        let is_confirmed = |(number, _): &(usize, &WorkerName)| confirmed & (1 << number) != 0;
        let at = self.begun + Duration::from_secs(confirmed_at.into());
        NamedPlaces {
            confirmed: self.names.iter().enumerate().filter(is_confirmed).map(|(_, name)| name.clone()).collect(),
            confirmed_ago: (confirmed != 0).then(|| now.saturating_duration_since(at)),
            handshakes: self.last_with_handshakes(places).cloned(),
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
    fn the_places_of_a_key_are_those_that_gateways_published_last() {
        let begun = Instant::now();
        let (mut numbers, mut places) = (GatewayNumbers::new(begun), KeyPlaces::default());
        assert_eq!(numbers.named(&places, begun), NamedPlaces::default());
        let at = |seconds| begun + Duration::from_secs(seconds);
        numbers.confirm(&mut places, &worker(1), true, at(10));
        numbers.confirm(&mut places, &worker(2), true, at(12));
        numbers.on_handshake(&mut places, &worker(3));
        numbers.on_handshake(&mut places, &worker(2));
        numbers.confirm(&mut places, &worker(1), false, at(20));
        let named = numbers.named(&places, at(22));
        assert_eq!((named.confirmed, named.handshakes), (vec![worker(2)], Some(worker(2))));
        assert_eq!(named.confirmed_ago, Some(Duration::from_secs(10)));
    }

    #[test]
    fn however_many_gateways_there_are_the_room_is_bounded() {
        let (mut numbers, mut places) = (GatewayNumbers::new(Instant::now()), KeyPlaces::default());
        for n in 0..MAX_GATEWAYS + 10 {
            numbers.confirm(&mut places, &worker(n), true, Instant::now());
            numbers.on_handshake(&mut places, &worker(n));
        }
        let named = numbers.named(&places, Instant::now());
        assert_eq!((numbers.names.len(), named.confirmed.len()), (MAX_GATEWAYS, MAX_GATEWAYS));
        assert_eq!(named.handshakes, Some(worker(MAX_GATEWAYS - 1)));
        assert_eq!(size_of::<KeyPlaces>(), 16);
    }
}
