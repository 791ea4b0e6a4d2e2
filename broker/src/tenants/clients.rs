//! In how many tenants each client has sessions, so that one alone does not take all networks. It has no IO and no clock.

use std::collections::BTreeMap;

use crate::client_ip::Client;
use crate::tenants::id::TenantId;

/// The part of all networks that the tenants of one client may take: many members may share an address, behind NAT.
const CLIENT_SHARE: u128 = 2;
/// The number of tenants that a client may have in any case.
const CLIENT_TENANTS_MIN: usize = 16;

/// The clients of a broker's sessions.
#[derive(Debug)]
pub struct Clients {
    most: usize,
    /// By tenant, how many sessions.
    tenants: BTreeMap<Client, BTreeMap<TenantId, usize>>,
}

impl Clients {
    /// Without clients. `networks`: how many networks there are for tenants.
    pub fn new(networks: u128) -> Self {
        let most = usize::try_from(networks / CLIENT_SHARE).unwrap_or(usize::MAX).max(CLIENT_TENANTS_MIN);
        Self { most, tenants: BTreeMap::new() }
    }

    /// Whether a client may have one more session in this tenant. This machine's own may have any.
    pub fn may_join(&self, client: Client, tenant: &TenantId) -> bool {
        let has_room = |tenants: &BTreeMap<_, _>| tenants.len() < self.most || tenants.contains_key(tenant);
        client.is_this_machine() || self.tenants.get(&client).is_none_or(has_room)
    }

    /// A session begins.
    pub fn add(&mut self, client: Client, tenant: TenantId) {
        *self.tenants.entry(client).or_default().entry(tenant).or_default() += 1;
    }

    /// A session is over.
    pub fn remove(&mut self, client: Client, tenant: &TenantId) {
        let Some(tenants) = self.tenants.get_mut(&client) else { return };
        if let Some(sessions) = tenants.get_mut(tenant) {
            *sessions -= 1;
            if *sessions == 0 {
                tenants.remove(tenant);
            }
        }
        if tenants.is_empty() {
            self.tenants.remove(&client);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn a_client_has_half_of_all_networks_and_a_few_in_any_case() {
        let tenant = |number: usize| TenantId::new(&number.to_string()).unwrap();
        let client = |number: u8| Client::from(IpAddr::from([192, 0, 2, number]));
        for (networks, most) in [(1, 16), (128, 64), (1024, 512), (1 << 100, usize::MAX)] {
            assert_eq!(Clients::new(networks).most, most);
        }
        let mut clients = Clients::new(40);
        for number in 0..20 {
            assert!(clients.may_join(client(1), &tenant(number)));
            clients.add(client(1), tenant(number));
        }
        clients.add(client(1), tenant(7));
        let may = |clients: &Clients, who, number| clients.may_join(who, &tenant(number));
        assert!(!may(&clients, client(1), 20) && may(&clients, client(1), 7) && may(&clients, client(2), 20));
        (0..100).for_each(|number| clients.add(Client::Local, tenant(number)));
        assert!(may(&clients, Client::Local, 100));
        clients.remove(client(1), &tenant(7));
        assert!(!may(&clients, client(1), 20), "it has another session there");
        clients.remove(client(1), &tenant(7));
        assert!(may(&clients, client(1), 20));
        (0..20).for_each(|number| clients.remove(client(1), &tenant(number)));
        assert_eq!(clients.tenants.len(), 1);
    }
}
