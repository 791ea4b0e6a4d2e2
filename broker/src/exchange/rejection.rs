//! Why a router's request is rejected: one list for the answer, the metrics and the status page.

use strum::{IntoStaticStr, VariantNames};
use wgkex_common::RejectReason;

use crate::exchange::rate_limit::{Limit, Limited};

/// Why a router's request is rejected. The text is for the router's owner and shows nothing that was sent; the name of the
/// variant in snake case is the metrics' label, and the order that of the status page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum Rejection {
    /// The body is not a valid request.
    #[error("{0}")]
    Body(&'static str),
    /// The body is larger than any request can be.
    #[error("the body is too large: at most 4096 bytes are allowed")]
    TooLarge,
    /// The body did not arrive in time.
    #[error("the body did not arrive in time")]
    Slow,
    /// The domain is not served.
    #[error("domain: this is not a domain that is served here")]
    Domain,
    /// The key cannot be used.
    #[error("public_key: {0}")]
    Key(wgkex_common::KeyError),
    /// The key is a gateway's, or derives a gateway's address.
    #[error("public_key: this key is not accepted, it or its address is a gateway's")]
    Reserved,
    /// Another key has the address that this one derives.
    #[error("public_key: the address of this key is another's at the moment")]
    AddressTaken,
    /// This broker cannot serve now; the reason is its state.
    #[error("no connection to the gateways at the moment, try again later")]
    NotReady,
    /// No gateway of the domain is online.
    #[error("no gateway of this domain is online, try again later")]
    NoGateway,
    /// MQTT did not take the key in time.
    #[error("the key could not be passed on in time, try again later")]
    NotPublished,
    /// No gateway confirmed the key in time.
    #[error("no gateway confirmed the key in time, try again later")]
    NotConfirmed,
    /// The key was requested too often; again in so many seconds.
    #[error("this key came too often, try again later")]
    LimitKey(u32),
    /// The key is not known, and its client sent too many others; again in so many seconds.
    #[error("too many new keys from this address, try again later")]
    LimitClient(u32),
    /// The key is not known, and its domain got too many others; again in so many seconds.
    #[error("too many new keys of this domain, try again later")]
    LimitDomain(u32),
    /// The key is not known, and too many others were requested; again in so many seconds.
    #[error("too many new keys at the moment, try again later")]
    LimitGlobal(u32),
    /// The access lists deny the key; the list and the reason are not for its owner.
    #[error("this key is not accepted here")]
    Denied,
    /// No gateway has room for a new key.
    #[error("the gateways have no room for new keys at the moment, try again later")]
    Full,
}

impl Rejection {
    /// One word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        self.into()
    }
}

/// The answer to a router whose key all gateways reject for this reason.
impl From<&RejectReason> for Rejection {
    fn from(reason: &RejectReason) -> Self {
        match reason {
            RejectReason::OwnKey | RejectReason::Reserved => Self::Reserved,
            RejectReason::AddressTaken => Self::AddressTaken,
            RejectReason::Denied => Self::Denied,
            RejectReason::Full => Self::Full,
            RejectReason::Removed
            | RejectReason::Altered
            | RejectReason::Interface
            | RejectReason::Interrupted
            | RejectReason::Kernel
            | RejectReason::Other(_) => Self::NotConfirmed,
        }
    }
}

impl From<Limited> for Rejection {
    fn from(Limited { limit, seconds }: Limited) -> Self {
        match limit {
            Limit::Key => Self::LimitKey(seconds),
            Limit::Client => Self::LimitClient(seconds),
            Limit::Domain => Self::LimitDomain(seconds),
            Limit::Global => Self::LimitGlobal(seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The labels from before they were derived: dashboards use them.
    #[test]
    fn the_labels_and_their_order_stay() {
        let labels = [
            "body",
            "too_large",
            "slow",
            "domain",
            "key",
            "reserved",
            "address_taken",
            "not_ready",
            "no_gateway",
            "not_published",
            "not_confirmed",
            "limit_key",
            "limit_client",
            "limit_domain",
            "limit_global",
            "denied",
            "full",
        ];
        assert_eq!(Rejection::VARIANTS, labels);
        for (limit, reason, text) in [
            (Limit::Key, "limit_key", "this key came too often, try again later"),
            (Limit::Client, "limit_client", "too many new keys from this address, try again later"),
            (Limit::Domain, "limit_domain", "too many new keys of this domain, try again later"),
            (Limit::Global, "limit_global", "too many new keys at the moment, try again later"),
        ] {
            let rejection = Rejection::from(Limited { limit, seconds: 7 });
            assert_eq!((rejection.reason(), rejection.to_string().as_str()), (reason, text));
        }
    }
}
