//! The messages between brokers of one bus about their tenants' members. One of them, the coordinator, gives all
//! addresses; the others send it the wishes of their sessions, and receive the members with their addresses.
//!
//! Frames between two brokers are numbered, each way by itself, in an epoch that begins when the broker that is no
//! coordinator registers its sessions. A lost frame shows as a gap in the numbers, and then the broker registers its
//! sessions again.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wgkex_common::{BrokerName, PublicKey};

use crate::tenants::close::CloseCause;
use crate::tenants::id::TenantId;
use crate::tenants::message::NAME_MAX;
use crate::tenants::table::{Member, MemberInfo};

/// Items of a frame at most.
pub const FRAME_MAX: usize = 100;

/// The number of a WebSocket at its broker since that was started; no other there has the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SessionId(pub u64);

/// A session of one of the brokers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SessionOrigin {
    /// The broker to which its client is connected.
    pub broker: BrokerName,
    /// Its number there.
    pub session: SessionId,
}

/// One message of a broker to another one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Frame {
    /// The sender.
    pub from: BrokerName,
    /// Of the registration since which the numbers count.
    pub epoch: u64,
    /// How many frames of this sender were before it in the epoch.
    pub number: u64,
    /// Its content.
    pub content: FrameContent,
}

impl Frame {
    /// Whether no name in it is longer than a client's may be.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        let is_short = |client: &MemberInfo| client.display_name.len() <= NAME_MAX;
        match &self.content {
            FrameContent::Requests(requests) => requests.iter().all(|request| match request {
                CoordinatorRequest::Session(JoinRequest { client, .. }, _)
                | CoordinatorRequest::Join(JoinRequest { client, .. }) => is_short(client),
                CoordinatorRequest::Register
                | CoordinatorRequest::Held(_)
                | CoordinatorRequest::Registered
                | CoordinatorRequest::Leave(_)
                | CoordinatorRequest::Alive(_) => true,
            }),
            FrameContent::Updates(updates) => updates.iter().all(|update| match update {
                Update::Joined(_, _, member) => is_short(&member.client),
                Update::Snapshot
                | Update::Complete
                | Update::Left(..)
                | Update::Address(..)
                | Update::Probe(_)
                | Update::Ended(..) => true,
            }),
            FrameContent::Unknown => true,
        }
    }
}

/// The content of a [`Frame`]. Without items it is only a sign that its sender is alive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrameContent {
    /// To the coordinator.
    Requests(Vec<CoordinatorRequest>),
    /// From it.
    Updates(Vec<Update>),
    /// From it: frames are missing, or it knows no registration. Its number does not count.
    Unknown,
}

/// A request of a broker to the coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CoordinatorRequest {
    /// A registration begins: all sessions and held addresses up to [`Self::Registered`].
    Register,
    /// One of its sessions, with the address that it received already.
    Session(JoinRequest, Option<IpAddr>),
    /// An address that is held, or a member's.
    Held(HeldAddress),
    /// These were all.
    Registered,
    /// A new session.
    Join(JoinRequest),
    /// A session is over.
    Leave(SessionId),
    /// A session answered a probe.
    Alive(SessionId),
}

/// An update of the coordinator for a broker, itself too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// A snapshot begins: all members and addresses up to [`Self::Complete`].
    Snapshot,
    /// The snapshot is complete.
    Complete,
    /// A session has become a member.
    Joined(TenantId, SessionOrigin, Arc<Member>),
    /// The member at this address has left.
    Left(TenantId, IpAddr),
    /// An address is held for the key from now on, be its owner a member or not; or none is.
    Address(TenantId, PublicKey, Option<IpAddr>),
    /// A session is to be asked whether it is alive.
    Probe(SessionId),
    /// A session is to end.
    Ended(SessionId, SessionEndReason),
}

/// The wish of a session to join a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The session.
    pub session: SessionId,
    /// The tenant that it wants to be a member of.
    pub tenant: TenantId,
    /// The client, as it describes itself.
    pub client: MemberInfo,
}

/// An address that its last member may have back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldAddress {
    /// The tenant.
    pub tenant: TenantId,
    /// For this key.
    pub key: PublicKey,
    /// The address.
    pub address: IpAddr,
}

/// Why the coordinator ends a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionEndReason {
    /// A member that is alive has the key.
    KeyInUse,
    /// All addresses of the tenant's network are taken.
    NoAddress,
    /// All networks are taken.
    NoNetwork,
    /// It does not answer.
    Silent,
    /// While brokers did not reach each other, another member was given its address.
    Conflict,
}

impl From<SessionEndReason> for CloseCause {
    fn from(refusal: SessionEndReason) -> Self {
        match refusal {
            SessionEndReason::KeyInUse => Self::KeyInUse,
            SessionEndReason::NoAddress => Self::NoAddress,
            SessionEndReason::NoNetwork => Self::NoNetwork,
            SessionEndReason::Silent => Self::Silent,
            SessionEndReason::Conflict => Self::Conflict,
        }
    }
}
